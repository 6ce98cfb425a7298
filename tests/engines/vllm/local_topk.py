"""The mutation local_topk for an engine's workers: a worker imports the class that is named as its extension."""

import mutations
import pytest


class LocalTopk:
    mutations.local_topk(pytest.MonkeyPatch())
