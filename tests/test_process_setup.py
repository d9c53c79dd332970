"""Settings of a whole process."""

import gc
import sys

import pytest

from featdistill.process_setup import large_imports


@pytest.mark.parametrize("is_there", [True, False])
def test_what_is_imported_is_left_out_of_garbage_collection_once(is_there, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", sys)
    if not is_there:
        monkeypatch.delitem(sys.modules, "torch")
    before = gc.get_freeze_count()
    try:
        with large_imports():
            assert gc.isenabled() == is_there
        assert gc.isenabled()
        assert (gc.get_freeze_count() > before) == (not is_there)
    finally:
        gc.unfreeze()
