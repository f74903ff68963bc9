//! Real programs from Debian's packages.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Story;
use crate::client::container;
use crate::node::Node;
use crate::wait;

pub const STORIES: &[Story] = &[
    ("nginx serves a page", nginx),
    ("redis stores and returns values", redis),
    ("postgres runs a transaction and stops cleanly", postgres),
    ("python runs threads, subprocesses and sockets", python),
];

const START: Duration = Duration::from_secs(90);

fn nginx() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("nginx")?;
    let pod = node.pod("nginx")?;
    node.cri().run(&pod, container("nginx", &image, &[]))?;
    let address = node.cri().pod_address(&pod)?;
    let page = wait::until("nginx serves", START, || {
        let Ok(mut stream) = TcpStream::connect((address.as_str(), 80)) else { return Ok(None) };
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(Some(text))
    })?;
    ensure!(page.contains("200 OK") && page.to_lowercase().contains("nginx"), "{page}");
    node.finish()
}

fn redis() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("redis")?;
    let pod = node.pod("redis")?;
    let id = node.cri().run(&pod, container("redis", &image, &[]))?;
    wait::until("redis answers", START, || {
        let output = node.cri().exec(&id, &["redis-cli", "ping"])?;
        Ok((output.stdout.trim() == "PONG").then_some(()))
    })?;
    let address = node.cri().pod_address(&pod)?;
    let mut stream = TcpStream::connect((address.as_str(), 6379)).context("redis by address")?;
    stream.write_all(b"SET color blue\r\nGET color\r\nQUIT\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    ensure!(text.contains("$4\r\nblue"), "{text}");
    node.finish()
}

fn postgres() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("postgres")?;
    let pod = node.pod("postgres")?;
    let cri = node.cri();
    let id = cri.run(&pod, container("db", &image, &[]))?;
    let ready = |id: &str| {
        wait::until("postgres answers", START, || {
            Ok((cri.exec(id, &["pg_isready", "-q"])?.code == 0).then_some(()))
        })
    };
    ready(&id).with_context(|| format!("{:?}", cri.log(&id)))?;
    let sql = "create table t as select generate_series(1, 1000) n; select sum(n) from t";
    let output = cri.exec(&id, &["psql", "-U", "postgres", "-qtAc", sql])?;
    ensure!(output.stdout.trim() == "500500", "{output:?}");
    cri.stop(&id, 30)?;
    ensure!(cri.status(&id)?.exit_code == 0, "it did not stop cleanly: {:?}", cri.status(&id)?);
    node.finish()
}

fn python() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("python")?;
    let pod = node.pod("python")?;
    let program = "import threading, subprocess, socket, os, tempfile\n\
        r = []\n\
        ts = [threading.Thread(target=lambda i=i: r.append(i)) for i in range(20)]\n\
        [t.start() for t in ts]; [t.join() for t in ts]\n\
        assert sorted(r) == list(range(20))\n\
        assert subprocess.check_output(['sh', '-c', 'echo $((6*7))']).strip() == b'42'\n\
        s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n\
        c = socket.create_connection(s.getsockname()); c.sendall(b'x' * 100000); c.close()\n\
        a, _ = s.accept()\n\
        n = 0\n\
        while True:\n\
        \x20 d = a.recv(65536)\n\
        \x20 if not d: break\n\
        \x20 n += len(d)\n\
        assert n == 100000\n\
        with tempfile.NamedTemporaryFile() as f:\n\
        \x20 f.write(os.urandom(1 << 20)); f.flush(); os.fsync(f.fileno())\n\
        print('passed', os.getpid())\n";
    let id = node.cri().run(&pod, container("c", &image, &["python3", "-c", program]))?;
    let status = node.cri().exited(&id)?;
    let log = node.cri().log(&id)?;
    ensure!(status.exit_code == 0, "{log:?}");
    ensure!(log.iter().any(|l| l.text.starts_with("passed")), "{log:?}");
    node.finish()
}
