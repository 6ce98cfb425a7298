"""The mutation local_topk for the workers of an engine, which import the class named as their extension."""

import mutations
import pytest


class LocalTopk:
    mutations.local_topk(pytest.MonkeyPatch())
