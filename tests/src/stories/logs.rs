//! CRI logs.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri::v1;

use super::Story;
use crate::client::{container, parse_log};
use crate::node::Node;

pub const STORIES: &[Story] = &[
    ("a long line is logged in partial lines", long_line),
    ("rotation under full output neither loses nor duplicates a line", rotation),
    ("a line without a newline is written when the stream ends", no_newline),
];

fn long_line() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("long")?;
    let line = "head -c 40000 /dev/zero | tr '\\0' x; echo; echo next";
    let id = node.cri().run(&pod, container("c", &image, &["sh", "-c", line]))?;
    node.cri().exited(&id)?;
    let log = node.cri().log(&id)?;
    let tags: String = log.iter().map(|l| l.tag.as_str()).collect();
    ensure!(tags == "PPFF", "tags {tags}");
    let joined: String = log[..3].iter().map(|l| l.text.as_str()).collect();
    ensure!(joined.len() == 40000 && joined.bytes().all(|b| b == b'x'), "{} bytes", joined.len());
    ensure!(log[3].text == "next", "{:?}", log[3]);
    node.finish()
}

fn rotation() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("rotate")?;
    let cri = node.cri();
    let line = "i=0; while [ $i -lt 60000 ]; do i=$((i+1)); echo line $i; done";
    let id = cri.run(&pod, container("c", &image, &["sh", "-c", line]))?;
    let path = cri.status(&id)?.log_path;
    let mut all = String::new();
    for round in 0..5 {
        std::thread::sleep(Duration::from_millis(300));
        let old = format!("{path}.{round}");
        std::fs::rename(&path, &old).context("renaming the log")?;
        let request = v1::ReopenContainerLogRequest { container_id: id.clone() };
        let mut client = cri.runtime.clone();
        match cri.block_on(async move { client.reopen_container_log(request).await }) {
            Ok(_) => {}
            // It may have exited meanwhile; then the log is not reopened.
            Err(status) if status.message().contains("not running") => {
                all.push_str(&std::fs::read_to_string(&old)?);
                break;
            }
            Err(status) => return Err(status.into()),
        }
        all.push_str(&std::fs::read_to_string(&old)?);
    }
    cri.exited(&id)?;
    all.push_str(&std::fs::read_to_string(&path).unwrap_or_default());
    let lines: Vec<String> = parse_log(all.as_bytes())?.into_iter().map(|l| l.text).collect();
    let expected: Vec<String> = (1..=60_000).map(|n| format!("line {n}")).collect();
    ensure!(lines.len() == expected.len(), "{} lines", lines.len());
    ensure!(lines == expected, "lines differ");
    node.finish()
}

fn no_newline() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("end")?;
    let id = node.cri().run(&pod, container("c", &image, &["printf", "no end"]))?;
    node.cri().exited(&id)?;
    let log = node.cri().log(&id)?;
    ensure!(log.len() == 1 && log[0].text == "no end", "{log:?}");
    node.finish()
}
