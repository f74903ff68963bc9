//! ExecSync.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tonic::Code;

use super::Story;
use crate::client::container;
use crate::node::Node;

pub const STORIES: &[Story] = &[
    ("exec returns both streams and the exit code", streams_and_code),
    ("exec past its timeout is killed and fails", time_out),
    ("exec of a missing command fails and names it", missing_command),
    ("exec returns large output completely up to its limit", large_output),
    ("exec in a container that is not running is rejected", not_running),
    ("concurrent execs each get their own output", many),
];

fn with_sleeper(story: impl FnOnce(&Node, &str) -> Result<()>) -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("exec")?;
    let id = node.cri().run(&pod, container("c", &image, &["sleep", "1000"]))?;
    story(&node, &id)?;
    node.finish()
}

fn streams_and_code() -> Result<()> {
    with_sleeper(|node, id| {
        let output = node.cri().exec(id, &["sh", "-c", "echo out; echo err >&2; exit 42"])?;
        ensure!(output.code == 42, "{output:?}");
        ensure!(output.stdout == "out\n" && output.stderr == "err\n", "{output:?}");
        let killed = node.cri().exec(id, &["sh", "-c", "kill -9 $$"])?;
        ensure!(killed.code == 137, "{killed:?}");
        Ok(())
    })
}

fn time_out() -> Result<()> {
    with_sleeper(|node, id| {
        let begin = Instant::now();
        let status = node.cri().exec_within(id, &["sleep", "777"], 2).unwrap_err();
        ensure!(status.code() == Code::DeadlineExceeded, "{status}");
        ensure!(begin.elapsed() < Duration::from_secs(60), "took {:?}", begin.elapsed());
        std::thread::sleep(Duration::from_millis(300));
        // A pattern that does not match itself: it is in the command lines of the shell and of grep.
        let left = node.cri().shell(id, "grep -l '[7]77' /proc/[0-9]*/cmdline | wc -l")?;
        ensure!(left == "0", "the process still runs");
        Ok(())
    })
}

fn missing_command() -> Result<()> {
    with_sleeper(|node, id| {
        let outcome = node.cri().exec(id, &["no-such-command"]);
        match outcome {
            Err(status) => ensure!(status.message().contains("no-such-command"), "{status}"),
            Ok(output) => anyhow::bail!("it ran: {output:?}"),
        }
        Ok(())
    })
}

fn large_output() -> Result<()> {
    with_sleeper(|node, id| {
        let output = node.cri().exec(id, &["sh", "-c", "seq 1 500000"])?;
        let expected: String = (1..=500_000).map(|n| format!("{n}\n")).collect();
        ensure!(output.code == 0 && output.stdout == expected, "{} bytes", output.stdout.len());
        Ok(())
    })
}

fn not_running() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("ended")?;
    let id = node.cri().run(&pod, container("c", &image, &["true"]))?;
    node.cri().exited(&id)?;
    let status = node.cri().exec(&id, &["true"]).unwrap_err();
    ensure!(status.message().contains("not running"), "{status}");
    let status = node.cri().exec("no-such-container", &["true"]).unwrap_err();
    ensure!(status.code() == Code::NotFound, "{status}");
    node.finish()
}

fn many() -> Result<()> {
    with_sleeper(|node, id| {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..20)
                .map(|n| {
                    scope.spawn(move || {
                        let line = format!("seq 1 {}; echo end {n}", 1000 + n);
                        node.cri().exec(id, &["sh", "-c", &line])
                    })
                })
                .collect();
            for (n, thread) in threads.into_iter().enumerate() {
                let output = thread.join().map_err(|_| anyhow::anyhow!("thread {n}"))??;
                ensure!(output.stdout.ends_with(&format!("\nend {n}\n")), "exec {n}: {output:?}");
                ensure!(output.stdout.lines().count() == 1001 + n, "exec {n} lost lines");
            }
            Ok(())
        })
    })
}
