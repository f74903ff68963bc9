//! ExecSync: a command to its end, both streams and the exit code.

use std::time::Duration;

use sandbox::model::ExecSpec;
use tonic::Status;

use super::Runtime;
use crate::convert::Refusal;
use crate::errors::{refusal_status, sandbox_status};
use crate::v1;

impl Runtime {
    pub(super) async fn exec_sync(
        &self,
        request: v1::ExecSyncRequest,
    ) -> Result<v1::ExecSyncResponse, Status> {
        if request.cmd.is_empty() {
            return Err(refusal_status(Refusal::invalid("cmd", "empty: say what to run")));
        }
        if request.timeout < 0 {
            return Err(refusal_status(Refusal::invalid("timeout", "below 0")));
        }
        // 0 is no limit.
        let timeout = u64::try_from(request.timeout).ok().filter(|seconds| *seconds > 0);
        let spec = ExecSpec {
            command: request.cmd,
            tty: false,
            stdin: false,
            env: vec![],
            user: String::new(),
            cwd: String::new(),
            tty_size: None,
        };
        let output = self
            .sandboxes
            .exec_sync(
                &request.container_id,
                spec,
                timeout.map(Duration::from_secs),
                self.config.exec_output_limit,
            )
            .await
            .map_err(sandbox_status)?;
        Ok(v1::ExecSyncResponse {
            stdout: output.stdout,
            stderr: output.stderr,
            exit_code: output.code,
        })
    }
}
