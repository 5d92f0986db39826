"""Public names of `import retentive`: a few calls, imported on first use."""

import inspect
import pydoc
import subprocess
import sys

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
        assert f"{name}(" in text or name == "train", name  # `train` may be the room, if it was imported before
    assert set(retentive.__all__) <= set(dir(retentive)) and "data" in dir(retentive)
    assert not {"Any", "TYPE_CHECKING", "import_module", "annotations", "sys"} & set(dir(retentive))


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'retentive' has no attribute 'lode'"):
        retentive.lode  # noqa: B018
