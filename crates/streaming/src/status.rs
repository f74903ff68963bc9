//! Result of a session on the error stream: from protocol version 4 on a meta/v1 Status in JSON;
//! before, the error text, or nothing on success.

use bytes::Bytes;
use serde::Serialize;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Exit code of an exec.
    Exited(i32),
    /// End of an attach session.
    Done,
    /// The process could not be started, or its exit code is unknown.
    Failed(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Text,
    Status,
}

#[derive(Serialize)]
struct Status {
    metadata: Empty,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u16>,
}

#[derive(Serialize)]
struct Empty {}

#[derive(Serialize)]
struct Details {
    causes: [Cause; 1],
}

#[derive(Serialize)]
struct Cause {
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    message: String,
}

impl Outcome {
    pub(crate) fn encode(self, form: Form) -> Bytes {
        match form {
            Form::Text => self.message().unwrap_or_default().into(),
            Form::Status => {
                serde_json::to_vec(&self.status()).expect("strings and numbers only").into()
            }
        }
    }

    fn message(&self) -> Option<String> {
        match self {
            Outcome::Done | Outcome::Exited(0) => None,
            Outcome::Exited(code) => {
                Some(format!("command terminated with non-zero exit code: exit code {code}"))
            }
            Outcome::Failed(error) => Some(format!("Internal error occurred: {error}")),
        }
    }

    fn status(self) -> Status {
        let message = self.message();
        let (reason, cause, code) = match self {
            Outcome::Done | Outcome::Exited(0) => (None, None, None),
            Outcome::Exited(code) => {
                // Clients read eight bits, and treat 0 as success.
                let code = Some(code & 0xff).filter(|c| *c != 0).unwrap_or(255);
                let cause = Cause { reason: Some("ExitCode"), message: code.to_string() };
                (Some("NonZeroExitCode"), Some(cause), None)
            }
            Outcome::Failed(error) => {
                let cause = Cause { reason: None, message: error };
                (Some("InternalError"), Some(cause), Some(500))
            }
        };
        Status {
            metadata: Empty {},
            status: if message.is_some() { "Failure" } else { "Success" },
            message,
            reason,
            details: cause.map(|cause| Details { causes: [cause] }),
            code,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(outcome: Outcome) -> serde_json::Value {
        serde_json::from_slice(&outcome.encode(Form::Status)).unwrap()
    }

    #[test]
    fn success_is_a_status_from_version_4_on_and_empty_before() {
        for outcome in [Outcome::Done, Outcome::Exited(0)] {
            assert_eq!(
                json(outcome.clone()),
                serde_json::json!({"metadata": {}, "status": "Success"})
            );
            assert!(outcome.encode(Form::Text).is_empty());
        }
    }

    #[test]
    fn an_exit_code_is_the_cause_of_a_failure() {
        let status = json(Outcome::Exited(7));
        assert_eq!(status["status"], "Failure");
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(
            status["details"]["causes"],
            serde_json::json!([{"reason": "ExitCode", "message": "7"}])
        );
        assert!(Outcome::Exited(7).encode(Form::Text).ends_with(b"exit code 7"));
        for (code, expected) in [(-1, "255"), (256, "255"), (137, "137")] {
            assert_eq!(json(Outcome::Exited(code))["details"]["causes"][0]["message"], expected);
        }
    }

    #[test]
    fn a_failure_is_an_internal_error_with_its_text() {
        let status = json(Outcome::Failed("no such container".into()));
        assert_eq!(status["reason"], "InternalError");
        assert_eq!(status["code"], 500);
        assert_eq!(status["message"], "Internal error occurred: no such container");
        assert_eq!(status["details"]["causes"][0]["message"], "no such container");
    }
}
