from __future__ import annotations

import pytest

from longclip_rt.errors import BackendError
from longclip_rt.system.closing import closed_after


class Model:
    def __init__(self, error: BaseException | None = None) -> None:
        self.closed, self.error = 0, error

    def close(self) -> None:
        self.closed += 1
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("ending", [None, KeyboardInterrupt(), BackendError("GPU 0 failed on a batch")])
def test_the_block_ends_as_it_would(ending: BaseException | None, caplog: pytest.LogCaptureFixture) -> None:
    for model in (Model(), Model(BackendError("GPU 0 failed while it was closed"))):
        try:
            with closed_after(model) as opened:
                assert opened is model
                if ending is not None:
                    raise ending
        except BaseException as error:
            assert error is ending
        assert model.closed == 1
    assert [record.message for record in caplog.records] == ["GPU 0 failed while it was closed"]


def test_a_fault_of_the_program_and_an_interruption_are_not_hidden() -> None:
    for error in (AttributeError("a slip"), KeyboardInterrupt()):
        with pytest.raises(type(error)), closed_after(Model(error)):
            pass
