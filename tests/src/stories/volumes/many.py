"""Creates files in a directory and keeps all of them open: `DIR COUNT`."""

import os
import resource
import sys

folder, count = sys.argv[1], int(sys.argv[2])
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
os.mkdir(folder)
held = [open(f"{folder}/{n}", "w+") for n in range(count)]
for n in (0, count // 2, count - 1):
    held[n].write(str(n))
    held[n].flush()
    held[n].seek(0)
    assert held[n].read() == str(n)
assert len(os.listdir(folder)) == count
print("passed")
