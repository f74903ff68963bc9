//! Exec, Attach, PortForward: each returns a URL that a client can use once.

use sandbox::model::{ContainerState, PodState};
use streaming::{AttachParams, ExecParams, PortForwardParams};
use tonic::Status;

use super::Runtime;
use crate::convert::Refusal;
use crate::errors::{refusal_status, sandbox_status, streaming_status};
use crate::v1;

impl Runtime {
    pub(super) async fn exec(&self, request: v1::ExecRequest) -> Result<v1::ExecResponse, Status> {
        let url = self.streams.exec_url(ExecParams {
            container: self.running(&request.container_id)?,
            command: request.cmd,
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        });
        Ok(v1::ExecResponse { url: url.map_err(streaming_status)? })
    }

    pub(super) async fn attach(
        &self,
        request: v1::AttachRequest,
    ) -> Result<v1::AttachResponse, Status> {
        let url = self.streams.attach_url(AttachParams {
            container: self.running(&request.container_id)?,
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        });
        Ok(v1::AttachResponse { url: url.map_err(streaming_status)? })
    }

    pub(super) async fn port_forward(
        &self,
        request: v1::PortForwardRequest,
    ) -> Result<v1::PortForwardResponse, Status> {
        let view = self.sandboxes.pod(&request.pod_sandbox_id).map_err(sandbox_status)?;
        if view.state != PodState::Ready {
            return Err(Status::failed_precondition(format!("pod {} is not running", view.id)));
        }
        let ports = ports(&request.port).map_err(refusal_status)?;
        let params = PortForwardParams { pod: view.id, ports };
        let url = self.streams.port_forward_url(params).map_err(streaming_status)?;
        Ok(v1::PortForwardResponse { url })
    }

    /// The whole id of a container that runs.
    fn running(&self, id: &str) -> Result<String, Status> {
        let view = self.sandboxes.container(id).map_err(sandbox_status)?;
        if view.state == ContainerState::Running {
            return Ok(view.id);
        }
        let state = format!("{:?}", view.state).to_lowercase();
        Err(Status::failed_precondition(format!(
            "container {} is not running: it is {state}",
            view.id
        )))
    }
}

fn ports(asked: &[i32]) -> Result<Vec<u16>, Refusal> {
    let port = |port: &i32| {
        u16::try_from(*port)
            .ok()
            .filter(|port| *port > 0)
            .ok_or_else(|| Refusal::invalid("port", format!("{port} is no port")))
    };
    asked.iter().map(port).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_ports() {
        assert_eq!(ports(&[80, 65535]), Ok(vec![80, 65535]));
        for wrong in [0, -1, 65536] {
            assert!(ports(&[wrong]).is_err(), "{wrong}");
        }
    }
}
