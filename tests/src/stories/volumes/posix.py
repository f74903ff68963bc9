"""POSIX semantics of a file system, in the directory of the first argument."""

import errno
import fcntl
import mmap
import os
import sys

os.chdir(sys.argv[1])
PAGE = 4096


def write(name, data):
    with open(name, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def in_child(action):
    """Runs in another process; returns its result."""
    pid = os.fork()
    if pid == 0:
        os._exit(1 if action() else 0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def locked(lock, name):
    """Whether the file is locked for another process."""

    def attempt():
        try:
            with open(name, "r+b") as file:
                lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.EACCES)
        return False

    return in_child(attempt)


# Names: rename over an open file, hard links, symbolic links, an unlinked file.
write("old", b"old")
write("new", b"new")
with open("old", "rb") as held:
    os.rename("new", "old")
    assert held.read() == b"old" and open("old", "rb").read() == b"new"
    assert not os.path.exists("new")
os.link("old", "linked")
assert os.stat("old").st_nlink == 2 and os.path.samefile("old", "linked")
os.symlink("old", "pointer")
assert open("pointer", "rb").read() == b"new"
with open("nameless", "w+b") as file:
    os.unlink("nameless")
    file.write(b"still here")
    file.seek(0)
    assert file.read() == b"still here"
try:
    os.rmdir("..")
    raise AssertionError("a folder that is not empty was removed")
except OSError as error:
    assert error.errno in (errno.ENOTEMPTY, errno.EBUSY), error

# Owners, modes, times, attributes.
os.chown("old", 1234, 2345)
os.chmod("old", 0o640)
os.utime("old", ns=(1_000_000_000, 2_000_000_001))
found = os.stat("linked")
assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (1234, 2345, 0o640), found
assert found.st_mtime_ns == 2_000_000_001, found
os.setxattr("old", "user.color", b"blue")
assert os.getxattr("linked", "user.color") == b"blue" and os.listxattr("old") == ["user.color"]

# Locks between processes, both kinds; released on close.
for lock in fcntl.flock, fcntl.lockf:
    with open("old", "r+b") as file:
        lock(file, fcntl.LOCK_EX)
        assert locked(lock, "old"), lock
    assert not locked(lock, "old"), lock

# Shared mappings: written by another process, read here and in the file.
write("mapped", bytes(2 * PAGE))
with open("mapped", "r+b") as file, mmap.mmap(file.fileno(), 2 * PAGE) as memory:

    def change():
        memory[PAGE : PAGE + 5] = b"child"
        memory.flush()
        return True

    assert in_child(change) and memory[PAGE : PAGE + 5] == b"child"
    assert os.pread(file.fileno(), 5, PAGE) == b"child"

# Direct I/O.
direct = os.open("direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
block = mmap.mmap(-1, PAGE)
block[:6] = b"direct"
assert os.pwritev(direct, [block], PAGE) == PAGE
block[:6] = bytes(6)
assert os.preadv(direct, [block], PAGE) == PAGE and block[:6] == b"direct"
os.close(direct)
assert open("direct", "rb").read()[PAGE : PAGE + 6] == b"direct"

# Sparse files.
with open("sparse", "w+b") as file:
    os.truncate(file.fileno(), 64 << 20)
    os.pwrite(file.fileno(), b"end", (64 << 20) - 3)
    os.fdatasync(file.fileno())
    assert os.lseek(file.fileno(), 0, os.SEEK_DATA) > 0, "no hole"
found = os.stat("sparse")
assert found.st_size == 64 << 20 and found.st_blocks * 512 < 1 << 20, found
with open("reserved", "w+b") as file:
    os.posix_fallocate(file.fileno(), 0, 1 << 20)
    assert os.fstat(file.fileno()).st_blocks * 512 >= 1 << 20

# Appending from several processes loses nothing.
write("appended", b"")


def append():
    file = os.open("appended", os.O_WRONLY | os.O_APPEND)
    for _ in range(50):
        os.write(file, b"0123456789")
    return True


assert all(in_child(append) for _ in range(2))
assert os.path.getsize("appended") == 1000

# Directories, and fsync of them.
os.makedirs("many")
for n in range(300):
    write(f"many/{n}", b"x") if n % 50 == 0 else open(f"many/{n}", "w").close()
assert len(os.listdir("many")) == 300
folder = os.open("many", os.O_RDONLY)
os.fsync(folder)
os.close(folder)
print("passed")
