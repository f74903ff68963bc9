//! A private nacelled, started by `nacelle run` on a host where none runs.
//!
//! There is at most one per host. It has its own directories, so that images are kept between runs.
//! Every `nacelle run` that uses it holds a shared lock. The last one, which gets the lock
//! exclusively when it ends, stops the daemon unless a pod still runs.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cri::v1;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::connect::{Client, PRIVATE_STATE, private_socket};
use super::find;
use crate::api::InfoRequest;

const ROOT: &str = "/var/lib/nacelle/private";
const START_LIMIT: Duration = Duration::from_secs(30);
const STOP_LIMIT: Duration = Duration::from_secs(10);

pub(super) struct Private {
    /// Shared while this process uses the daemon.
    lock: Flock<File>,
}

fn lock_file() -> Result<File> {
    std::fs::create_dir_all(PRIVATE_STATE).with_context(|| {
        format!(
            "creating {PRIVATE_STATE} (starting a private nacelled needs root: use sudo, or start nacelled)"
        )
    })?;
    let path = Path::new(PRIVATE_STATE).join("lock");
    File::create(&path).with_context(|| path.display().to_string())
}

fn flock(file: File, how: FlockArg) -> Result<Flock<File>> {
    Flock::lock(file, how).map_err(|(_, error)| error).context("locking the private nacelled")
}

impl Private {
    /// Takes the shared lock, if the client is connected to the private daemon.
    pub(super) fn join(client: &Client) -> Option<Self> {
        if client.socket != private_socket() {
            return None;
        }
        let lock = flock(lock_file().ok()?, FlockArg::LockShared).ok()?;
        Some(Self { lock })
    }

    /// Starts the daemon, unless another process has started it in the meantime.
    pub(super) async fn start() -> Result<Self> {
        let file = lock_file()?;
        let lock =
            tokio::task::spawn_blocking(move || flock(file, FlockArg::LockExclusive)).await??;
        if Client::dial(&private_socket()).await.is_err() {
            spawn().await?;
        }
        lock.relock(FlockArg::LockShared).context("sharing the lock of the private nacelled")?;
        Ok(Self { lock })
    }

    pub(super) async fn connect(&self) -> Result<Client> {
        Client::dial(&private_socket()).await
    }

    /// Stops the daemon if no other process uses it and none of its pods runs.
    pub(super) async fn leave(self) {
        if self.lock.relock(FlockArg::LockExclusiveNonblock).is_err() {
            return;
        }
        // Over the private socket, so that no other daemon is stopped.
        let Ok(mut client) = self.connect().await else { return };
        let ready = v1::PodSandboxState::SandboxReady as i32;
        let busy = match find::all_pods(&mut client).await {
            Ok(pods) => pods.iter().any(|pod| pod.state == ready),
            Err(_) => return,
        };
        if busy {
            return;
        }
        let Ok(info) = client.debug.info(InfoRequest {}).await else { return };
        let Ok(pid) = i32::try_from(info.into_inner().pid) else { return };
        if kill(Pid::from_raw(pid), Signal::SIGTERM).is_err() {
            return;
        }
        // The lock is held until the daemon has ended, so that the next run starts a new one.
        let begin = Instant::now();
        while begin.elapsed() < STOP_LIMIT && kill(Pid::from_raw(pid), None).is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn spawn() -> Result<()> {
    let program = nacelled();
    let conf_dir = Path::new(ROOT).join("cni");
    std::fs::create_dir_all(&conf_dir).with_context(|| conf_dir.display().to_string())?;
    std::fs::write(
        conf_dir.join("10-nacelle.conflist"),
        network::default_conflist(Some(network::DEFAULT_IPV4), network::host_ipv6())?,
    )?;
    let log_path = Path::new(PRIVATE_STATE).join("nacelled.log");
    let log = File::create(&log_path).with_context(|| log_path.display().to_string())?;
    let mut daemon = Command::new(&program)
        .args(["--root", ROOT, "--state", PRIVATE_STATE, "--cni-conf-dir"])
        .arg(&conf_dir)
        // The address of the configuration file is for the node's own daemon.
        .args(["--metrics-listen", ""])
        // The variable names the socket of another daemon.
        .env_remove("NACELLE_SOCKET")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // Ctrl-C must not reach the daemon.
        .process_group(0)
        .spawn()
        .with_context(|| format!("starting {}", program.display()))?;
    let begin = Instant::now();
    loop {
        if Client::dial(&private_socket()).await.is_ok() {
            return Ok(());
        }
        if let Some(status) = daemon.try_wait()? {
            let said = std::fs::read_to_string(&log_path).unwrap_or_default();
            let last = said.lines().last().unwrap_or("its log is empty");
            bail!("the private nacelled exited on start ({status}): {last}");
        }
        if begin.elapsed() > START_LIMIT {
            let _ = daemon.kill();
            bail!(
                "the private nacelled did not answer within {START_LIMIT:?}: see {}",
                log_path.display()
            );
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// In this program's directory, otherwise found through PATH.
fn nacelled() -> PathBuf {
    let sibling = std::env::current_exe().ok().map(|own| own.with_file_name("nacelled"));
    sibling.filter(|path| path.is_file()).unwrap_or_else(|| "nacelled".into())
}
