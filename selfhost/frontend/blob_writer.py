"""BlobWriter: one blob on its way into the cache, and the Sink that a transport writes to.

The bytes go into a private temporary file beside their later place and through the hasher at the same time.
Only `publish` gives them the name of a digest, and only theirs: mode, fsync of the file, rename, fsync of the
folder, in this order, so that after a crash or a power cut there is the whole blob under that name or
nothing. Nothing is made on the disk before the first byte comes.

The size is not reserved in advance. That would save a sixteenth of the writing with fsync (8 files of
together 20 MB: 14.3 instead of 15.4 ms), but a card that lies about sizes would fill the disk before it sent
a byte, and where a file system cannot reserve, the C library writes to every block to do so.

A writer is for one thread at a time. While it has a file it holds that and the cache's folders that it needs:
three descriptors, four in the moment of publishing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import TYPE_CHECKING, Callable, NoReturn, Optional, Union

from ..card.checksum import Checksum, new_hasher
from ..errors import CacheError, VerificationError, shown_url
from .blobs import Blobs
from .folders import BLOBS, CREATE, OpenRoot, cannot, sync
from .names import temporary_blob

if TYPE_CHECKING:
    from blake3 import blake3 as Hasher

    from .transport import Bytes

_BLOB_MODE = 0o444  # whatever the umask is: nobody is to write to a blob by mistake


class BlobWriter:
    """Writes one blob; a context manager whose end removes what was not published.

    `received` counts the bytes so far; `validator` is the transport's to set, see Sink. Every method raises
    CacheError where the disk refuses; the temporary file is gone then and the writer is as new.
    """

    def __init__(
        self,
        checksum: Checksum,
        *,
        blobs: Blobs,
        open_root: Callable[[], OpenRoot],
        fsync: bool,
    ) -> None:
        self.checksum = checksum
        self.received = 0
        self.validator: Optional[str] = None
        self._blobs = blobs
        self._open_root = open_root
        self._fsync = fsync
        self._hasher: Hasher = new_hasher()
        self._opened: Optional[OpenRoot] = None
        self._fd = -1
        self._name: Optional[str] = None  # of the temporary file, while it is ours to remove

    # -------------------------------------------------------------- the sink

    def write(self, data: Bytes) -> None:
        """Append bytes to the file and to what is hashed."""
        try:
            fd = self._file()
            rest: Union[Bytes, memoryview] = data
            while len(rest):
                rest = memoryview(rest)[os.write(fd, rest) :]  # short on a full disk, and above 2 GiB
        except OSError as err:
            self._fail("write", err)
        self._hasher.update(data)
        self.received += len(data)

    def restart(self) -> None:
        """Forget all bytes and the validator."""
        self.validator = None
        self.received = 0
        self._hasher = new_hasher()
        if self._fd >= 0:
            try:
                os.ftruncate(self._fd, 0)
                os.lseek(self._fd, 0, os.SEEK_SET)
            except OSError as err:
                self._fail("write", err)

    # -------------------------------------------------------------- the end

    def publish(self, source: str) -> str:
        """Give the file the name of its digest, where it is right, and return its path.

        Bytes that are not those of the digest are a VerificationError about `source`, nothing appears, and
        the writer can be used again after `restart`. A right blob that is there already stays.
        """
        actual = Checksum(self._hasher.hexdigest())
        if actual != self.checksum:
            raise VerificationError(
                f"{shown_url(source)} brought {self.received} bytes with the checksum {actual}, "
                f"expected {self.checksum}: they are not kept",
                url=source,
                expected=str(self.checksum),
                actual=str(actual),
                size=self.received,
            )
        try:
            self._publish(self._file())
        except OSError as err:
            self._fail("publish", err)
        finally:
            self.discard()
        return self._blobs.path_of(self.checksum.hex)

    def _publish(self, fd: int) -> None:
        opened, hex = self._opened, self.checksum.hex
        if opened is None or self._name is None:  # _file() has seen to both
            raise CacheError("the blob writer has no file", path=self._blobs.path_of(hex))
        folder = opened[BLOBS].fd
        os.fchmod(fd, _BLOB_MODE)
        if self._fsync:
            os.fsync(fd)
        if self._blobs.has(hex, opened):  # what is wrong is set aside
            return
        written = os.fstat(fd)
        os.rename(self._name, hex, src_dir_fd=folder, dst_dir_fd=folder)
        self._name = None
        if self._fsync:
            sync(folder)
        self._blobs.note_published(hex, fd, written, opened, is_on_disk=self._fsync)
        found = os.stat(hex, dir_fd=folder, follow_symlinks=False)
        ours = written.st_ino, self.received, written.st_mtime_ns
        if (found.st_ino, found.st_size, found.st_mtime_ns) != ours and not self._blobs.has(hex, opened):
            path = self._blobs.path_of(hex)
            raise CacheError(f"somebody changed {path!r} while it was published: try again", path=path)

    def discard(self) -> None:
        """Remove the temporary file, if there is one, and be as new; never raises."""
        fd, self._fd = self._fd, -1
        opened, self._opened = self._opened, None
        name, self._name = self._name, None
        self.received = 0
        self.validator = None
        self._hasher = new_hasher()
        if opened is not None:
            with opened, contextlib.suppress(OSError):  # what stays is reaped, an hour from now
                if name is not None:
                    os.unlink(name, dir_fd=opened[BLOBS].fd)
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    # -------------------------------------------------------------- the temporary file

    def _file(self) -> int:
        """Return the descriptor of the temporary file, made at the first call."""
        if self._fd < 0:
            self._opened = self._open_root()
            name = temporary_blob(self.checksum.hex)
            self._fd = os.open(name, CREATE, 0o600, dir_fd=self._opened[BLOBS].fd)
            self._name = name
            _claim(self._fd)
        return self._fd

    def _fail(self, action: str, err: OSError) -> NoReturn:
        folder = f"{self._blobs.root.path}/{BLOBS}"
        self.discard()
        raise cannot(f"{action} the blob {self.checksum} in", folder, err) from err

    def __repr__(self) -> str:
        return f"<BlobWriter {self.checksum} received={self.received}>"


def _claim(fd: int) -> None:
    """Tell whoever reaps temporary files that this one's writer lives, where there are locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        if err.errno in (errno.EBADF, errno.EINVAL):  # a mistake of ours, nothing that a file system says
            raise
