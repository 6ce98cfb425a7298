"""What test_hugging_face_kernels.py starts: copies of the package beside the plain one, which must agree.

    python tests/copies.py importlib|kernels REPOSITORY ...

A repository is a folder as Hugging Face's `kernels` reads it. It takes the name of a copy from metadata.json.
"""

import functools
import importlib
import importlib.util
import json
import os
import pickle
import pkgutil
import sys
from pathlib import Path

TRITON = importlib.util.find_spec("triton") is not None
os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch  # noqa: E402

CPU = torch.device("cpu")


def main(loader, *repositories):
    copies = [{"importlib": load, "kernels": load_from_hub}[loader](Path(path)) for path in repositories]
    failures = [failing_modules(package) for package in copies]
    computed = [results(package) for package in copies]
    assert not [name for name in sys.modules if name.partition(".")[0] == "sparse_attn"]  # all is relative

    import sparse_attn

    assert failing_modules(sparse_attn, modules(copies[0])) == failures[0]  # what needs another library
    namespaces = {submodule(package, "ops").NAMESPACE for package in (sparse_attn, *copies)}
    assert "sparse_attn" in namespaces and len(namespaces) == 1 + len(copies)
    assert all(hasattr(getattr(torch.ops, name), "sparse_mla") for name in namespaces)
    expected = results(sparse_attn)
    for package, ours in zip(copies, computed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        native = submodule(package, "ops.backends.native")
        assert native.LIBRARY.is_relative_to(package.__path__[0])
        assert native.available() == submodule(sparse_attn, "ops.backends.native").available()
        for check in submodule(package, "testing.self_check").CHECKS.values():
            check("cpu", CPU)
        config = pickle.loads(pickle.dumps(package.DSAConfig.deepseek_v32()))
        assert type(config) is package.DSAConfig is not sparse_attn.DSAConfig
    if "integrations.transformers" not in failures[0]:
        compare_models([sparse_attn, *copies])
    print("compared; cannot be imported here:", *failures[0] or ["none"])


def load(repository):
    """As `kernels` does it."""
    variant = repository / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


def load_from_hub(repository):
    from kernels import get_local_kernel

    return get_local_kernel(repository, backend="cpu")


def submodule(package, name):
    return importlib.import_module(f"{package.__name__}.{name}")


def modules(package):
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [module.name.removeprefix(f"{package.__name__}.") for module in found]


def failing_modules(package, names=None):
    """Those that cannot be imported."""
    failing = []
    for name in names or modules(package):
        try:
            submodule(package, name)
        except Exception:  # whatever it is: the plain package has to fail too
            failing.append(name)
    return failing


def results(package):
    """Of C++ or torch, of the same under torch.compile, and of a Triton kernel."""
    random = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    cache = torch.zeros(4, 16, 656, dtype=torch.uint8)
    package.write_kv(random(64, 576), cache, torch.arange(64))
    positions = package.lightning_topk(random(3, 16, 64), random(64, 64), random(3, 16), 8)
    q = random(3, 16, 576)
    compiled = torch.compile(package.sparse_mla, fullgraph=True, backend="aot_eager")
    attended = package.sparse_mla(q, cache, positions), compiled(q, cache, positions)
    table = torch.tensor([[3, 1, 0, 2]], dtype=torch.int32)
    backends = ("cpu", "triton") if TRITON else ("cpu",)
    slots = [package.physical_slots(positions, table, 16, backend=backend) for backend in backends]
    return cache, positions, *attended, *slots


def compare_models(packages):
    """A model of transformers for each copy, all enabled before any of them runs."""
    sys.path.append(str(Path(__file__).with_name("hf")))
    from tiny import VOCABULARY, make

    ids = torch.arange(140).view(2, 70) % VOCABULARY
    models = [make("v32") for _ in packages]
    for package, model in zip(packages, models, strict=True):
        submodule(package, "integrations.transformers").enable(model)
    first, *others = [model(ids).logits for model in models]
    assert all(torch.equal(first, other) for other in others)


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:])
