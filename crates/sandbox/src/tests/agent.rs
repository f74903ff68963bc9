//! A fake guest whose processes behave as their first argument says: `print TEXT` prints and exits
//! with 0, `fail N` exits with N, `forever` runs until it is signalled, `ignore-term` until it is
//! killed, `print-forever TEXT` prints and then runs, `leave TEXT` prints and exits with 0 while a
//! child process holds its output open; `print-broken TEXT` prints, and its first output connection
//! breaks in the middle. Streams are framed except with `print-unframed TEXT`.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use agent_api::stdio::{FIXED, FRAME_HEADER, Kind, MAX_FRAME, Open, Status as StreamStatus};
use agent_api::v1;
use agent_api::v1::agent_server::{Agent, AgentServer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

/// Port of a listener in the pod.
pub(super) const LISTENING: u16 = 8080;

type Answer<T> = Result<Response<T>, Status>;

#[derive(Default)]
pub(super) struct Guest {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) processes: BTreeMap<(String, String), Process>,
    events: Vec<v1::Event>,
    acked: u64,
    measured: i64,
    pub(super) unresponsive: bool,
    /// Pings return an error.
    pub(super) refuse_hello: bool,
    /// Protocol version of the agent; 0: the current one.
    pub(super) protocol: u32,
    pub(super) configured: u32,
    pub(super) refuse_create: bool,
    pub(super) refuse_remove: bool,
    pub(super) refuse_writes: bool,
    /// Online and present CPUs.
    pub(super) cpus: u32,
    pub(super) max_cpus: u32,
    pub(super) update: Option<v1::UpdateContainerRequest>,
    pub(super) freezes: Vec<v1::FreezeContainerRequest>,
    /// Disks found by a rescan.
    disks: BTreeSet<String>,
    pub(super) volumes: BTreeMap<String, Volume>,
    pub(super) empty_dirs: BTreeMap<String, EmptyDir>,
    pub(super) create: Option<v1::CreateContainerRequest>,
    pub(super) configure: Option<v1::ConfigurePodRequest>,
}

/// Files by path; a swap replaces them with the staged ones.
#[derive(Default)]
pub(super) struct Volume {
    pub(super) files: BTreeMap<String, Vec<u8>>,
    staged: Option<BTreeMap<String, Vec<u8>>>,
}

#[derive(Default)]
pub(super) struct EmptyDir {
    /// The last request, without files.
    pub(super) made: v1::PrepareEmptyDirRequest,
    pub(super) files: BTreeMap<String, Vec<u8>>,
    pub(super) ready: bool,
    /// Number of requests with `begin`.
    pub(super) begun: u32,
}

#[derive(Default)]
pub(super) struct Process {
    args: Vec<String>,
    running: bool,
    pub(super) exit: Option<v1::Exit>,
    stdout: Vec<u8>,
    /// A child process holds its output open.
    held: bool,
    pub(super) stdin: Vec<u8>,
    pub(super) stdin_connections: u32,
    pub(super) stdout_acked: u64,
    /// Signals received.
    pub(super) signals: Vec<u32>,
}

impl Guest {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn run(&self, key: (String, String)) {
        let mut state = self.lock();
        let process = state.processes.get_mut(&key).unwrap();
        process.running = true;
        let args = process.args.clone();
        match args[0].as_str() {
            "print" | "print-forever" | "print-broken" | "print-unframed" | "leave" => {
                process.stdout.extend(args[1].bytes());
            }
            _ => {}
        }
        process.held = args[0] == "leave";
        match args[0].as_str() {
            "print" | "print-broken" | "print-unframed" | "leave" => self.end(&mut state, &key, 0),
            "fail" => self.end(&mut state, &key, args[1].parse().unwrap()),
            "eat" => {
                let oom = v1::Oom { container_id: key.0.clone() };
                let sequence = state.events.len() as u64 + 1;
                let event = Some(v1::event::Event::Oom(oom));
                state.events.push(v1::Event { sequence, event });
                self.end(&mut state, &key, 137);
            }
            _ => {}
        }
        drop(state);
        self.changed.notify_waiters();
    }

    pub(super) fn print(&self, container: &str, text: &str) {
        let mut state = self.lock();
        let process = state.processes.get_mut(&(container.to_owned(), String::new())).unwrap();
        process.stdout.extend(text.bytes());
        drop(state);
        self.changed.notify_waiters();
    }

    /// Ends the child that holds a container's output open.
    pub(super) fn release_output(&self, container: &str) {
        let key = (container.to_owned(), String::new());
        self.lock().processes.get_mut(&key).unwrap().held = false;
        self.changed.notify_waiters();
    }

    fn end(&self, state: &mut State, key: &(String, String), code: i32) {
        let process = state.processes.get_mut(key).unwrap();
        if process.exit.is_some() {
            return;
        }
        process.running = false;
        let exit = v1::Exit {
            container_id: key.0.clone(),
            exec_id: key.1.clone(),
            code,
            unix_time_ns: 1_700_000_000_000_000_000,
            ..Default::default()
        };
        process.exit = Some(exit.clone());
        let event = Some(v1::event::Event::Exit(exit));
        let sequence = state.events.len() as u64 + 1;
        state.events.push(v1::Event { sequence, event });
    }

    /// Serves the hybrid vsock listener until dropped.
    pub(super) async fn serve(self: Arc<Self>, listener: UnixListener) {
        let (grpc, incoming) = tokio::sync::mpsc::channel::<std::io::Result<UnixStream>>(8);
        let service = AgentServer::from_arc(Arc::new(AgentService(self.clone())))
            .max_decoding_message_size(agent_api::MAX_MESSAGE);
        let incoming = tokio_stream::wrappers::ReceiverStream::new(incoming);
        let server =
            tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming);
        let accept = async {
            let mut streams = tokio::task::JoinSet::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                if self.lock().unresponsive {
                    continue;
                }
                let mut line = Vec::new();
                while !line.ends_with(b"\n") {
                    match stream.read_u8().await {
                        Ok(byte) => line.push(byte),
                        Err(_) => break,
                    }
                }
                if stream.write_all(b"OK 5\n").await.is_err() {
                    continue;
                }
                if line == b"CONNECT 1024\n" {
                    let _ = grpc.send(Ok(stream)).await;
                } else if line == b"CONNECT 1026\n" {
                    streams.spawn(async move {
                        let _ = forward(stream).await;
                    });
                } else {
                    let guest = self.clone();
                    streams.spawn(async move {
                        let _ = guest.stream(stream).await;
                    });
                }
            }
        };
        tokio::select! {
            _ = server => {}
            () = accept => {}
        }
    }

    /// Serves the sockets of a host pod until dropped.
    pub(super) async fn serve_sockets(
        self: Arc<Self>,
        [control, stdio, forwards]: [UnixListener; 3],
    ) {
        let service = AgentServer::from_arc(Arc::new(AgentService(self.clone())));
        let incoming = tokio_stream::wrappers::UnixListenerStream::new(control);
        let server =
            tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming);
        let accept = async {
            let mut streams = tokio::task::JoinSet::new();
            loop {
                tokio::select! {
                    Ok((stream, _)) = stdio.accept() => {
                        let guest = self.clone();
                        streams.spawn(async move { drop(guest.stream(stream).await) });
                    }
                    Ok((stream, _)) = forwards.accept() => {
                        streams.spawn(async move { drop(forward(stream).await) });
                    }
                }
            }
        };
        tokio::select! {
            _ = server => {}
            () = accept => {}
        }
    }

    async fn stream(&self, mut stream: UnixStream) -> std::io::Result<()> {
        let mut fixed = [0; FIXED];
        stream.read_exact(&mut fixed).await?;
        let (a, b) = Open::id_lengths(&fixed).unwrap();
        let mut ids = vec![0; a + b];
        stream.read_exact(&mut ids).await?;
        let open = Open::decode(&fixed, &ids).unwrap();
        let key = (open.container_id, open.exec_id);
        let Some(args) = self.lock().processes.get(&key).map(|process| process.args.clone()) else {
            return stream.write_all(&[StreamStatus::NoSuchStream as u8]).await;
        };
        if open.framed && args[0] == "print-unframed" {
            return stream.write_all(&[StreamStatus::BadHeader as u8]).await;
        }
        let breaks = args[0] == "print-broken" && open.offset == 0 && open.kind == Kind::Stdout;
        stream.write_all(&[StreamStatus::Ok as u8]).await?;
        if open.kind == Kind::Stdin {
            self.lock().processes.get_mut(&key).unwrap().stdin_connections += 1;
            while let Ok(byte) = stream.read_u8().await {
                self.lock().processes.get_mut(&key).unwrap().stdin.push(byte);
            }
            return Ok(());
        }
        let (mut read, mut write) = stream.into_split();
        let send = async {
            let mut at = open.offset as usize;
            loop {
                let changed = self.changed.notified();
                let (bytes, over) = {
                    let state = self.lock();
                    let Some(process) = state.processes.get(&key) else { return };
                    let out = if open.kind == Kind::Stdout { &process.stdout[..] } else { &[] };
                    (out[at.min(out.len())..].to_vec(), process.exit.is_some() && !process.held)
                };
                at += bytes.len();
                let mut sent = Vec::new();
                for part in bytes.chunks(MAX_FRAME) {
                    if open.framed {
                        sent.extend((part.len() as u32).to_le_bytes());
                    }
                    sent.extend(part);
                }
                if breaks && !bytes.is_empty() {
                    let _ = write.write_all(&sent[..sent.len() - 3]).await;
                    return;
                }
                if over && open.framed {
                    sent.extend([0; FRAME_HEADER]);
                }
                if write.write_all(&sent).await.is_err() {
                    return;
                }
                if over {
                    let _ = write.shutdown().await;
                    return std::future::pending().await;
                }
                let _ = tokio::time::timeout(Duration::from_millis(20), changed).await;
            }
        };
        let acks = async {
            while let Ok(ack) = read.read_u64_le().await {
                if open.kind == Kind::Stdout
                    && let Some(process) = self.lock().processes.get_mut(&key)
                {
                    process.stdout_acked = process.stdout_acked.max(ack);
                }
            }
        };
        tokio::select! { () = send => {}, () = acks => {} }
        Ok(())
    }
}

/// An echo server on [`LISTENING`]; other ports refuse.
async fn forward(mut stream: UnixStream) -> std::io::Result<()> {
    use agent_api::forward::{LENGTH, Open, Status};
    let mut header = [0; LENGTH];
    stream.read_exact(&mut header).await?;
    if Open::decode(header).unwrap().port != LISTENING {
        return stream.write_all(&[Status::Refused as u8]).await;
    }
    stream.write_all(&[Status::Ok as u8]).await?;
    let (mut read, mut write) = stream.into_split();
    tokio::io::copy(&mut read, &mut write).await?;
    write.shutdown().await
}

struct AgentService(Arc<Guest>);

impl AgentService {
    async fn wait_until_responsive(&self) {
        while self.0.lock().unresponsive {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn signal(&self, key: (String, String), signal: u32) -> Result<(), Status> {
        let mut state = self.0.lock();
        let process = state.processes.get_mut(&key).ok_or_else(|| Status::not_found("process"))?;
        process.signals.push(signal);
        let ignores = process.args[0] == "ignore-term" && signal != 9;
        if process.running && !ignores {
            self.0.end(&mut state, &key, 128 + signal as i32);
        }
        drop(state);
        self.0.changed.notify_waiters();
        Ok(())
    }
}

#[tonic::async_trait]
impl Agent for AgentService {
    async fn hello(&self, _: Request<v1::HelloRequest>) -> Answer<v1::HelloReply> {
        self.wait_until_responsive().await;
        let (refuses, protocol) = {
            let state = self.0.lock();
            (state.refuse_hello, state.protocol)
        };
        if refuses {
            return Err(Status::internal("cannot read /proc/uptime"));
        }
        Ok(Response::new(v1::HelloReply {
            protocol: if protocol == 0 { agent_api::PROTOCOL } else { protocol },
            kernel_release: "6.1.0-fake".into(),
            ..Default::default()
        }))
    }

    async fn configure_pod(
        &self,
        request: Request<v1::ConfigurePodRequest>,
    ) -> Answer<v1::ConfigurePodReply> {
        assert!(request.get_ref().entropy.len() >= 64);
        let mut state = self.0.lock();
        state.configured += 1;
        state.configure = Some(request.into_inner());
        Ok(Response::new(v1::ConfigurePodReply {}))
    }

    async fn create_container(
        &self,
        request: Request<v1::CreateContainerRequest>,
    ) -> Answer<v1::CreateContainerReply> {
        let request = request.into_inner();
        let spec: oci_spec::runtime::Spec = serde_json::from_slice(&request.oci_spec).unwrap();
        let args = spec.process().as_ref().unwrap().args().clone().unwrap();
        let mut state = self.0.lock();
        if state.refuse_create {
            return Err(Status::invalid_argument("no such user"));
        }
        let key = (request.container_id.clone(), String::new());
        state.create = Some(request);
        state.processes.insert(key, Process { args, ..Default::default() });
        Ok(Response::new(v1::CreateContainerReply { pid: 7, uid: 5, gid: 6, groups: vec![6, 7] }))
    }

    async fn start_container(
        &self,
        request: Request<v1::StartContainerRequest>,
    ) -> Answer<v1::StartContainerReply> {
        let key = (request.into_inner().container_id, String::new());
        let missing = self.0.lock().processes.get(&key).is_some_and(|p| p.args[0] == "missing");
        if missing {
            // The process that should have executed the program exits, and its exit is reported
            // before the reply.
            self.0.end(&mut self.0.lock(), &key, 1);
            tokio::time::sleep(Duration::from_millis(50)).await;
            return Err(Status::not_found("no such program"));
        }
        let late = self.0.lock().processes.get(&key).is_some_and(|p| p.args[0] == "late");
        self.0.run(key);
        if late {
            return Err(Status::deadline_exceeded("the program has not started yet"));
        }
        Ok(Response::new(v1::StartContainerReply {}))
    }

    async fn remove_container(
        &self,
        request: Request<v1::RemoveContainerRequest>,
    ) -> Answer<v1::RemoveContainerReply> {
        let id = request.into_inner().container_id;
        if self.0.lock().refuse_remove {
            return Err(Status::deadline_exceeded("processes still exist"));
        }
        self.0.lock().processes.retain(|(container, _), _| *container != id);
        Ok(Response::new(v1::RemoveContainerReply {}))
    }

    async fn update_container(
        &self,
        request: Request<v1::UpdateContainerRequest>,
    ) -> Answer<v1::UpdateContainerReply> {
        self.0.lock().update = Some(request.into_inner());
        Ok(Response::new(v1::UpdateContainerReply {}))
    }

    async fn freeze_container(
        &self,
        request: Request<v1::FreezeContainerRequest>,
    ) -> Answer<v1::FreezeContainerReply> {
        self.0.lock().freezes.push(request.into_inner());
        Ok(Response::new(v1::FreezeContainerReply {}))
    }

    async fn exec(&self, request: Request<v1::ExecRequest>) -> Answer<v1::ExecReply> {
        let request = request.into_inner();
        let process: serde_json::Value = serde_json::from_slice(&request.oci_process).unwrap();
        let args = serde_json::from_value(process["args"].clone()).unwrap();
        let key = (request.container_id, request.exec_id);
        let process = Process { args, ..Default::default() };
        if process.args[0] == "slow" {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        self.0.lock().processes.insert(key.clone(), process);
        self.0.run(key);
        Ok(Response::new(v1::ExecReply { pid: 8 }))
    }

    async fn signal_process(
        &self,
        request: Request<v1::SignalProcessRequest>,
    ) -> Answer<v1::SignalProcessReply> {
        let request = request.into_inner();
        self.signal((request.container_id, request.exec_id), request.signal)?;
        Ok(Response::new(v1::SignalProcessReply {}))
    }

    async fn resize_tty(&self, _: Request<v1::ResizeTtyRequest>) -> Answer<v1::ResizeTtyReply> {
        Ok(Response::new(v1::ResizeTtyReply {}))
    }

    async fn list_processes(
        &self,
        _: Request<v1::ListProcessesRequest>,
    ) -> Answer<v1::ListProcessesReply> {
        let state = self.0.lock();
        let processes = state.processes.iter().map(|((container, exec), p)| {
            let process_state = match (&p.exit, p.running) {
                (Some(_), _) => v1::ProcessState::Ended,
                (None, true) => v1::ProcessState::Running,
                (None, false) => v1::ProcessState::Created,
            };
            v1::Process {
                container_id: container.clone(),
                exec_id: exec.clone(),
                pid: 9,
                state: process_state.into(),
                exit: p.exit.clone(),
            }
        });
        Ok(Response::new(v1::ListProcessesReply { processes: processes.collect() }))
    }

    type EventsStream = Pin<Box<dyn Stream<Item = Result<v1::Event, Status>> + Send>>;

    async fn events(&self, _: Request<v1::EventsRequest>) -> Answer<Self::EventsStream> {
        let guest = self.0.clone();
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        let mut next = guest.lock().acked as usize;
        tokio::spawn(async move {
            loop {
                let events = guest.lock().events[next..].to_vec();
                next += events.len();
                for event in events {
                    if sender.send(Ok(event)).await.is_err() {
                        return;
                    }
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        Ok(Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver))))
    }

    async fn ack_events(
        &self,
        request: Request<v1::AckEventsRequest>,
    ) -> Answer<v1::AckEventsReply> {
        self.0.lock().acked = request.into_inner().sequence;
        Ok(Response::new(v1::AckEventsReply {}))
    }

    async fn stats(&self, _: Request<v1::StatsRequest>) -> Answer<v1::StatsReply> {
        self.wait_until_responsive().await;
        let mut state = self.0.lock();
        state.measured += 1;
        let containers = state.processes.keys().map(|(id, _)| v1::ContainerStats {
            container_id: id.clone(),
            pids: 3,
            ..Default::default()
        });
        let containers = containers.collect();
        Ok(Response::new(v1::StatsReply { unix_time_ns: state.measured, containers, pod: None }))
    }

    async fn rescan_devices(
        &self,
        request: Request<v1::RescanDevicesRequest>,
    ) -> Answer<v1::RescanDevicesReply> {
        self.0.lock().disks.extend(request.into_inner().disk_serials);
        Ok(Response::new(v1::RescanDevicesReply {}))
    }

    async fn release_device(
        &self,
        request: Request<v1::ReleaseDeviceRequest>,
    ) -> Answer<v1::ReleaseDeviceReply> {
        if !self.0.lock().disks.remove(&request.into_inner().disk_serial) {
            return Err(Status::failed_precondition("no such disk"));
        }
        Ok(Response::new(v1::ReleaseDeviceReply {}))
    }

    async fn write_volume(
        &self,
        request: Request<v1::WriteVolumeRequest>,
    ) -> Answer<v1::WriteVolumeReply> {
        let request = request.into_inner();
        let mut state = self.0.lock();
        if state.refuse_writes {
            return Err(Status::resource_exhausted("tmpfs is full"));
        }
        let volume = state.volumes.entry(request.volume_id).or_default();
        if request.swap && request.files.iter().any(|f| f.path.starts_with("..")) {
            volume.staged = None;
            return Err(Status::invalid_argument("reserved name"));
        }
        let into = match request.swap {
            true => volume.staged.get_or_insert_default(),
            false => &mut volume.files,
        };
        for file in request.files {
            let content = into.entry(file.path).or_default();
            if !file.append {
                content.clear();
            }
            content.extend(file.content);
        }
        if request.swap && !request.more {
            volume.files = volume.staged.take().unwrap_or_default();
        }
        Ok(Response::new(v1::WriteVolumeReply {}))
    }

    async fn prepare_empty_dir(
        &self,
        request: Request<v1::PrepareEmptyDirRequest>,
    ) -> Answer<v1::PrepareEmptyDirReply> {
        let mut request = request.into_inner();
        let mut state = self.0.lock();
        let dir = state.empty_dirs.entry(request.volume_id.clone()).or_default();
        if !dir.ready {
            if request.begin {
                dir.files.clear();
                dir.begun += 1;
            }
            for file in std::mem::take(&mut request.files) {
                let content = dir.files.entry(file.path).or_default();
                if !file.append {
                    content.clear();
                }
                content.extend(file.content);
            }
            dir.ready = request.done;
            dir.made = request;
        }
        Ok(Response::new(v1::PrepareEmptyDirReply { ready: dir.ready }))
    }

    async fn read_volume_file(
        &self,
        request: Request<v1::ReadVolumeFileRequest>,
    ) -> Answer<v1::ReadVolumeFileReply> {
        self.wait_until_responsive().await;
        let request = request.into_inner();
        let state = self.0.lock();
        let file = state.volumes.get(&request.volume_id).and_then(|v| v.files.get(&request.path));
        let content = file.cloned().ok_or_else(|| Status::not_found("no such file"))?;
        Ok(Response::new(v1::ReadVolumeFileReply { content }))
    }

    async fn resize_pod(
        &self,
        request: Request<v1::ResizePodRequest>,
    ) -> Answer<v1::ResizePodReply> {
        self.wait_until_responsive().await;
        let mut state = self.0.lock();
        state.cpus = request.into_inner().cpus.min(state.max_cpus);
        Ok(Response::new(v1::ResizePodReply { cpus: state.cpus }))
    }

    async fn shutdown(&self, _: Request<v1::ShutdownRequest>) -> Answer<v1::ShutdownReply> {
        self.wait_until_responsive().await;
        Ok(Response::new(v1::ShutdownReply {}))
    }
}
