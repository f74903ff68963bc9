//! Errors to gRPC status codes; the only file that knows both sides.
//!
//! A kubelet acts on few codes: NOT_FOUND (gone: carry on with the clean-up), DEADLINE_EXCEEDED
//! (a probe timed out), UNIMPLEMENTED (do without), UNAVAILABLE (try again). All else is shown to
//! people, so the message says what was wrong and what to do.

use image::{Error as ImageError, ErrorKind};
use sandbox::Error as SandboxError;
use tonic::{Code, Status};

use crate::convert::Refusal;

pub fn sandbox_status(error: SandboxError) -> Status {
    let code = match &error {
        SandboxError::NotFound { .. } => Code::NotFound,
        SandboxError::Exists { .. } => Code::AlreadyExists,
        SandboxError::Ambiguous { .. } | SandboxError::InvalidArgument { .. } => {
            Code::InvalidArgument
        }
        SandboxError::FailedPrecondition { .. } => Code::FailedPrecondition,
        SandboxError::Deadline { .. } | SandboxError::ExecTimeout { .. } => Code::DeadlineExceeded,
        SandboxError::ResourceExhausted { .. } => Code::ResourceExhausted,
        SandboxError::Unavailable { .. } | SandboxError::NotListening { .. } => Code::Unavailable,
        // Not UNIMPLEMENTED: a kubelet would go on as if it had been done.
        SandboxError::OutOfRange { .. } => Code::OutOfRange,
        SandboxError::Cancelled { .. } => Code::Cancelled,
        SandboxError::Unsupported { .. } => Code::Unimplemented,
        SandboxError::Internal(_) => Code::Unknown,
    };
    Status::new(code, error.to_string())
}

pub fn image_status(error: ImageError) -> Status {
    let code = match error.kind() {
        ErrorKind::InvalidArgument => Code::InvalidArgument,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::PermissionDenied => Code::PermissionDenied,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::DeadlineExceeded => Code::DeadlineExceeded,
        ErrorKind::ResourceExhausted => Code::ResourceExhausted,
        ErrorKind::BadImage => Code::FailedPrecondition,
        ErrorKind::Cancelled => Code::Cancelled,
        ErrorKind::Internal => Code::Unknown,
    };
    Status::new(code, with_causes(&error))
}

/// An error's text and those of its sources, which it does not repeat.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

pub fn refusal_status(refusal: Refusal) -> Status {
    let code = match &refusal {
        Refusal::Invalid { .. } => Code::InvalidArgument,
        Refusal::Unsupported { .. } => Code::Unimplemented,
    };
    Status::new(code, refusal.to_string())
}

pub fn streaming_status(error: streaming::Error) -> Status {
    let code = match &error {
        streaming::Error::Invalid(_) => Code::InvalidArgument,
        streaming::Error::TooManyPending { .. } => Code::ResourceExhausted,
        streaming::Error::Bind { .. }
        | streaming::Error::Pem { .. }
        | streaming::Error::Tls { .. } => Code::Internal,
    };
    Status::new(code, with_causes(&error))
}

/// A call of the CRI that nacelle does not implement.
pub fn unimplemented(sentence: &str) -> Status {
    Status::unimplemented(sentence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_class_of_error_has_the_code_that_a_kubelet_acts_on() {
        let limit = std::time::Duration::from_secs(1);
        let table = [
            (SandboxError::NotFound { what: "pod", id: "x".into() }, Code::NotFound),
            (
                SandboxError::Exists { what: "pod", name: "a".into(), holder: "b".into() },
                Code::AlreadyExists,
            ),
            (
                SandboxError::Ambiguous { what: "pod", id: "a".into(), count: 2 },
                Code::InvalidArgument,
            ),
            (SandboxError::ExecTimeout { limit }, Code::DeadlineExceeded),
            (SandboxError::Deadline { what: "boot".into(), limit }, Code::DeadlineExceeded),
            (SandboxError::ResourceExhausted { message: "full".into() }, Code::ResourceExhausted),
            (SandboxError::Unavailable { message: "gone".into() }, Code::Unavailable),
            (SandboxError::Unsupported { message: "no".into() }, Code::Unimplemented),
        ];
        for (error, code) in table {
            let text = error.to_string();
            let status = sandbox_status(error);
            assert_eq!((status.code(), status.message()), (code, text.as_str()));
        }
    }

    #[test]
    fn a_refusal_names_the_field() {
        let status =
            refusal_status(Refusal::unsupported("linux.devices", "a pod has no host device"));
        assert_eq!(status.code(), Code::Unimplemented);
        assert_eq!(status.message(), "linux.devices: a pod has no host device");
    }
}
