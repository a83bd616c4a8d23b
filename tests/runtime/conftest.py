"""The runtime around a kernel is tested with a layout in plain torch, wherever the tests run."""

from pathlib import Path

import pytest

from hf_sparse.runtime import layouts


@pytest.fixture
def plain_layout(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for name in list(layouts.LAYOUTS):
        monkeypatch.delitem(layouts.LAYOUTS, name)
    monkeypatch.setitem(layouts.LAYOUTS, "plain", layouts.Layout("cpu", "plain_layout"))
