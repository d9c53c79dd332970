import os
import signal

import pytest
from torch.utils.data import Dataset

from featdistill.command_line import UserError
from featdistill.data.loading import make_loader


class Failing(Dataset):
    """Items whose loading ends in an error, or kills the process."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        if index == 2:
            if self.error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise self.error
        return {"index": index}


SHM = "unable to allocate shared memory(shm) for file </torch_2_1_0>: No space left on device (28)"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (RuntimeError(SHM), "more shared memory .* --workers 0"),
        (RuntimeError("unable to write to file </torch_7_8>: No space left on device (28)"), "shared memory"),
        (OSError(24, "Too many open files"), "ulimit -n 65536"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n 65536"),
        (None, "a worker of the loader died, .* fewer --workers"),
    ],
)
def test_what_the_system_denies_a_worker_is_one_line_that_says_what_to_do(error, remedy):
    with pytest.raises(UserError, match=remedy) as raised:
        list(make_loader(Failing(error), [[0, 1], [2, 3]], workers=1))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_stay_what_they_are(workers):
    for error in (RuntimeError("shapes do not match"), KeyError("a"), ValueError("shared memory")):
        with pytest.raises(type(error)):
            list(make_loader(Failing(error), [[0, 1], [2, 3]], workers))


def test_without_workers_their_remedies_do_not_apply():
    with pytest.raises(RuntimeError, match="shared memory"):
        list(make_loader(Failing(RuntimeError(SHM)), [[2]], workers=0))


class Refusing(Dataset):
    """What reading from a storage that refuses the credentials does."""

    def __getitem__(self, index):
        raise UserError("s3://bucket/1.jpg: the storage refuses the credentials; check them")


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_a_worker_is_one_line(workers):
    with pytest.raises(UserError, match=r"^s3://bucket/1\.jpg: the storage refuses .*; check them$"):
        list(make_loader(Refusing(), [[0]], workers))
