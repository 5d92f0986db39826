"""Public names of `import retentive`: a few calls, imported on first use."""

import inspect
import pydoc
import subprocess
import sys
from importlib import import_module
from types import ModuleType

import pytest

import retentive


def test_importing_the_package_loads_nothing_heavy():
    code = "import retentive, sys; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'safetensors')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_every_name_is_there_and_says_what_it_does():
    text = pydoc.plain(pydoc.render_doc(retentive))
    for name in retentive.__all__:
        call = getattr(retentive, name)
        assert callable(call) and inspect.getdoc(call), name
        room = isinstance(call, ModuleType)  # if it was imported before, as `train`
        assert f"{name}(" in text or room, name
    assert sorted(dir(retentive)) == sorted([*retentive.__all__, "__version__"])


def test_a_room_that_was_imported_is_still_the_call(monkeypatch):
    for name in ("bench", "compare", "export", "serve", "train"):
        room = import_module(f"retentive.{name}")
        assert getattr(retentive, name) is room
        monkeypatch.setattr(f"retentive.calls.{name}", lambda *args, **options: (args, options))
        assert room(1, two=2) == ((1,), {"two": 2})


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'retentive' has no attribute 'lode'"):
        retentive.lode  # noqa: B018
