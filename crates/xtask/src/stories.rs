//! Runs the stories: on this host if its KVM is usable, else divided among parallel labs.
//!
//! A lab has one CPU (see `lab::machine`), so two of them on a host with two CPUs are as fast as
//! one with two. A few stories need several CPUs; they get a lab of their own.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::lab::{STATUS_LAB_FAILED, STATUS_TIMEOUT};
use crate::{kvm, paths, run};

/// The shard of a run of `nacelle-tests`: `1/2`, or `wide` for stories that need several CPUs.
const SHARD: &str = "NACELLE_PART";
const WIDE: &str = "wide";
/// CPUs of the lab for the shard `wide`.
const WIDE_CPUS: &str = "2";
/// What a lab may come to use of the host's memory, MiB: its own 6 GiB, and QEMU's.
const LAB_MIB: u64 = 6144 + 512;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Seconds that one lab may take
    #[arg(long, default_value_t = 3600)]
    timeout: u64,
    /// Labs side by side; by default as many as CPUs and memory allow
    #[arg(long)]
    labs: Option<usize>,
    /// A filter and libtest's options
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<i32> {
    let mut command = "nacelle-tests".to_owned();
    for word in &args.words {
        command += &format!(" {}", quoted(word));
    }
    let timeout = args.timeout.to_string();
    build_agent_tests()?;
    let kvm = kvm::probe();
    if kvm.usable {
        return lab(&["--auto", "--timeout", &timeout], &command);
    }
    eprintln!("KVM here {}: running inside the lab", kvm.why);
    // Built once, before several labs need it.
    lab(&["--prepare"], "")?;

    let labs = args.labs.unwrap_or_else(labs_that_fit).clamp(1, count("1/1", &args.words)?.max(1));
    let mut parts: VecDeque<String> = (1..=labs).map(|at| format!("{at}/{labs}")).collect();
    if count(WIDE, &args.words)? > 0 {
        parts.push_back(WIDE.to_owned());
    }
    let parts = Mutex::new(parts);
    let next = || parts.lock().ok()?.pop_front();
    let work = || -> Result<i32> {
        let mut worst = 0;
        while let Some(shard) = next() {
            let variable = format!("{SHARD}={shard}");
            let cpus = if shard == WIDE { WIDE_CPUS } else { "1" };
            let options = ["--images", "--timeout", &timeout, "--env", &variable, "--cpus", cpus];
            let begin = Instant::now();
            let status = lab(&options, &command)?;
            if status == STATUS_LAB_FAILED || status == STATUS_TIMEOUT {
                eprintln!(
                    "the lab of shard {shard} did not finish ({status}): its other stories were not run"
                );
            }
            println!("--- stories {shard}: {} s", begin.elapsed().as_secs());
            worst = if worst == 0 { status } else { worst };
        }
        Ok(worst)
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..labs).map(|_| scope.spawn(work)).collect();
        let mut worst = 0;
        for worker in workers {
            let status = worker.join().ok().context("a worker panicked")??;
            worst = if worst == 0 { status } else { worst };
        }
        Ok(worst)
    })
}

/// Builds the agent's tests that need a VM and puts them beside the other binaries, where the
/// stories find them.
fn build_agent_tests() -> Result<()> {
    // The same feature set as in `make unit`, so that nothing is compiled twice.
    let messages = run::output(Command::new("cargo").args([
        "test",
        "--quiet",
        "--release",
        "--workspace",
        "--test",
        "guest",
        "--no-run",
        "--message-format=json",
    ]))?;
    let built = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        // The agent's own program is built with it.
        .filter(|message| message["target"]["name"] == "guest")
        .find_map(|message| Some(PathBuf::from(message["executable"].as_str()?)))
        .context("cargo built no test program named guest")?;
    fs::copy(&built, paths::binaries("release").join("nacelle-agent-tests"))
        .with_context(|| format!("copying {}", built.display()))?;
    Ok(())
}

/// Number of stories in `shard` that match the filter.
fn count(shard: &str, words: &[String]) -> Result<usize> {
    let tests = paths::newest_binary("nacelle-tests").context("nacelle-tests is not built")?;
    let out = Command::new(tests)
        .args(words)
        .arg("--list")
        .env(SHARD, shard)
        .stderr(Stdio::inherit())
        .output()
        .context("starting nacelle-tests")?;
    anyhow::ensure!(out.status.success(), "nacelle-tests --list: {}", out.status);
    Ok(String::from_utf8_lossy(&out.stdout).lines().filter(|l| l.ends_with(": test")).count())
}

fn labs_that_fit() -> usize {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available_kib = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok())
        .unwrap_or(0);
    cpus.min((available_kib / 1024 / LAB_MIB) as usize).max(1)
}

/// Quotes a word for the shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Runs `xtask lab` as a process of its own; what it prints comes in whole lines.
fn lab(options: &[&str], command: &str) -> Result<i32> {
    let mut lab = Command::new(std::env::current_exe().context("this program's own path")?);
    lab.arg("lab").args(options);
    if !command.is_empty() {
        lab.arg("--").arg(command);
    }
    lab.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = lab.spawn().context("starting a lab")?;
    let stdout = child.stdout.take().context("the output is not a pipe")?;
    let stderr = child.stderr.take().context("the output is not a pipe")?;
    thread::scope(|scope| {
        scope.spawn(|| whole_lines(stdout, std::io::stdout()));
        scope.spawn(|| whole_lines(stderr, std::io::stderr()));
    });
    Ok(child.wait()?.code().unwrap_or(STATUS_LAB_FAILED))
}

fn whole_lines(from: impl Read, mut to: impl Write) {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    // A reader of ours that is gone must not stop the stories: the rest is read and dropped.
    while from.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
        let _ = to.write_all(&line).and_then(|()| to.flush());
        line.clear();
    }
}
