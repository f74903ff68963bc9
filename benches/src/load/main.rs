//! The load of `nacelle-bench share`: one small program that works on a folder and says how long each
//! kind of work took. It is the same on all sides: a process of the host, a process of a container,
//! and the first process of a guest that `nacelle-bench` starts itself. In a guest with a network
//! interface it is the guest's side of `nacelle-bench net` instead.

mod net;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::mount::{MsFlags, mount};

/// Of the guest's own port to the bench.
const PORT: &str = "/dev/vport0p1";
const TRACING: &str = "/sys/kernel/tracing";
/// Of the trace, KiB for each CPU.
const TRACE_BUFFER: &str = "8192";
const BLOCK: usize = 1 << 20;

fn main() -> Result<()> {
    if std::process::id() == 1 && Path::new("/init").exists() && !Path::new("/proc/self").exists() {
        return guest();
    }
    let words: Vec<String> = std::env::args().skip(1).collect();
    work(&words, &mut std::io::stdout())
}

/// The first process of a guest: executes the commands on its port.
fn guest() -> Result<()> {
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(at)?;
        mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>)?;
    }
    if !Path::new(PORT).exists() && net::wanted() {
        return net::serve();
    }
    fs::create_dir_all("/data")?;
    let mut port = OpenOptions::new().read(true).write(true).open(PORT)?;
    let mounted = mount(Some("bench"), "/data", Some("virtiofs"), MsFlags::empty(), None::<&str>);
    match mounted {
        Ok(()) => writeln!(port, "ready\n.")?,
        Err(error) => writeln!(port, "no share: {error}\n.")?,
    }
    let lines = BufReader::new(port.try_clone()?).lines();
    for line in lines {
        let line = line?;
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let mut output = Vec::new();
        if let Err(error) = work(&words, &mut output) {
            output = format!("failed: {error:#}\n").into_bytes();
        }
        output.extend(b".\n");
        port.write_all(&output)?;
    }
    Ok(())
}

/// `FOLDER NAME FILES WRITES [trace] PHASE...`: files of the phases are in FOLDER/NAME, FOLDER/big is
/// read.
fn work(words: &[String], output: &mut dyn Write) -> Result<()> {
    let [folder, name, files, writes, phases @ ..] = words else {
        bail!("usage: FOLDER NAME FILES WRITES [trace] PHASE...")
    };
    let folder = Path::new(folder);
    let load = Load {
        big: folder.join("big"),
        own: folder.join(name),
        files: files.parse()?,
        writes: writes.parse()?,
    };
    fs::create_dir_all(&load.own)?;
    let mut tracing = false;
    for phase in phases {
        if phase == "trace" {
            start_tracing().context("tracing")?;
            tracing = true;
            continue;
        }
        load.prepare(phase)?;
        if tracing {
            fs::write(Path::new(TRACING).join("trace"), "")?;
        }
        let begin = Instant::now();
        load.run(phase).with_context(|| phase.clone())?;
        writeln!(output, "time {phase} {}", begin.elapsed().as_micros())?;
        if tracing {
            for (request, count) in requests()? {
                writeln!(output, "count {phase} {request} {count}")?;
            }
        }
    }
    let cpus = std::thread::available_parallelism()?;
    let memory = fs::read_to_string("/proc/meminfo")?;
    let kib = memory.split_whitespace().nth(1).unwrap_or_default();
    writeln!(output, "cpus {cpus}\nmemory {kib}")?;
    Ok(())
}

struct Load {
    big: PathBuf,
    own: PathBuf,
    files: usize,
    writes: usize,
}

impl Load {
    fn file(&self, n: usize) -> PathBuf {
        self.own.join(format!("file-{n}"))
    }

    fn prepare(&self, phase: &str) -> Result<()> {
        match phase {
            "read-cached" => self.read(),
            "read-new" | "read-uncached" => {
                let all = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
                Ok(posix_fadvise(File::open(&self.big)?, 0, 0, all)?)
            }
            _ => Ok(()),
        }
    }

    fn run(&self, phase: &str) -> Result<()> {
        match phase {
            "nothing" => {}
            "create" => {
                for n in 0..self.files {
                    let mut new = OpenOptions::new();
                    new.write(true).create_new(true).mode(0o644).open(self.file(n))?;
                }
            }
            "stat" => {
                for n in 0..self.files {
                    fs::symlink_metadata(self.file(n))?;
                }
            }
            "list" => {
                let mut seen = 0;
                for entry in fs::read_dir(&self.own)? {
                    entry?.metadata()?;
                    seen += 1;
                }
                anyhow::ensure!(seen == self.files, "{seen} files");
            }
            "unlink" => {
                for n in 0..self.files {
                    fs::remove_file(self.file(n))?;
                }
            }
            "fsync" => {
                let path = self.own.join("log");
                let file = File::create(&path)?;
                for n in 0..self.writes {
                    file.write_all_at(&[n as u8; 4096], 4096 * n as u64)?;
                    file.sync_all()?;
                }
                drop(file);
                fs::remove_file(path)?;
            }
            "read-cached" | "read-new" | "read-uncached" => self.read()?,
            other => bail!("no phase {other:?}"),
        }
        Ok(())
    }

    fn read(&self) -> Result<()> {
        let mut file = File::open(&self.big)?;
        let mut block = vec![0; BLOCK];
        while file.read(&mut block)? > 0 {}
        Ok(())
    }
}

fn start_tracing() -> Result<()> {
    let at = Path::new(TRACING);
    if !at.join("trace").exists() {
        mount(Some("t"), at, Some("tracefs"), MsFlags::empty(), None::<&str>)?;
    }
    fs::write(at.join("buffer_size_kb"), TRACE_BUFFER)?;
    fs::write(at.join("events/fuse/fuse_request_send/enable"), "1")?;
    Ok(())
}

/// Requests in the trace, by their names.
fn requests() -> Result<BTreeMap<String, u64>> {
    let mut counts = BTreeMap::new();
    for line in fs::read_to_string(Path::new(TRACING).join("trace"))?.lines() {
        let Some((_, rest)) = line.split_once("opcode ") else { continue };
        let name = rest.split(['(', ')']).nth(1).unwrap_or(rest);
        *counts.entry(name.trim_start_matches("FUSE_").to_owned()).or_default() += 1;
    }
    Ok(counts)
}
