"""What a stranger's file, name or place must not be able to do: run code, or reach a shell."""

import ast
from pathlib import Path

import numpy as np
import pytest

from maxlm.data.store import StoreError, TokenStore
from tests.data.test_store import write

ROOT = Path(__file__).parent.parent
CODE = sorted(path for folder in ("maxlm", "launch", "tools") for path in (ROOT / folder).rglob("*.py"))
# Modules whose readers run what they read.
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


# Processes of one program talk to their own children over pipes: no stranger's file is read there.
OWN_CHILDREN = {"maxlm/data/workers.py": ["imports pickle"]}


def dotted(node: ast.AST) -> str:
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def findings(source: str) -> list[str]:
    """What in a module could run code that comes from a file, or pass text to a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"imports {a.name}" for a in node.names if a.name.split(".")[0] in UNSAFE]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE:
            found.append(f"imports from {node.module}")
        elif isinstance(node, ast.Call):
            name, settings = dotted(node.func), {k.arg: k.value for k in node.keywords}
            if name in ("eval", "exec", "os.system", "os.popen", "torch.load", "yaml.load", "yaml.unsafe_load"):
                found.append(f"calls {name}")
            if name in ("np.load", "numpy.load"):
                allowed = settings.get("allow_pickle")
                if allowed is not None and not (isinstance(allowed, ast.Constant) and allowed.value is False):
                    found.append("allows pickles in np.load")
            if name.startswith("subprocess.") and not (
                settings.get("shell") is None or getattr(settings["shell"], "value", True) is False
            ):
                found.append(f"{name} with a shell")
    return found


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from dill import load", "eval(x)", "os.system(path)", "yaml.load(f)", "torch.load(f)",
     "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=x)", "subprocess.run(a, shell=True)",
     "subprocess.Popen(a, shell=x)", "import cloudpickle as c"],
)  # fmt: skip
def test_the_check_sees_what_it_is_for(source):
    assert findings(source)


def test_nothing_here_unpickles_evaluates_or_calls_a_shell():
    assert len(CODE) > 100
    found = {str(path.relative_to(ROOT)): findings(path.read_text()) for path in CODE}
    assert {name: what for name, what in found.items() if what} == OWN_CHILDREN


class Trap:
    """Unpickling one of these makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_store_with_a_pickle_in_it_is_refused_and_runs_nothing(tmp_path):
    store = write(tmp_path / "store", [b"one", b"two two"])
    sprung = tmp_path / "sprung"
    np.save(store.path / "train-offsets.npy", np.array([Trap(sprung)] * 3, dtype=object), allow_pickle=True)
    with pytest.raises(StoreError, match="train-offsets.npy"):
        TokenStore.open(store.path)
    assert not sprung.exists()
    np.load(store.path / "train-offsets.npy", allow_pickle=True)  # the trap is a real one
    assert sprung.exists()
