//! Errors as ttrpc status codes; containerd handles NOT_FOUND and ALREADY_EXISTS specially.

use containerd_shim_protos::ttrpc::{self, Code, get_status};
use sandbox::Error;

pub(crate) fn status(code: Code, message: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, message.into()))
}

pub(crate) fn not_found(what: &str, id: &str) -> ttrpc::Error {
    status(Code::NOT_FOUND, format!("{what} {id}: not found"))
}

pub(crate) fn precondition(message: impl Into<String>) -> ttrpc::Error {
    status(Code::FAILED_PRECONDITION, message)
}

pub(crate) fn invalid(message: impl Into<String>) -> ttrpc::Error {
    status(Code::INVALID_ARGUMENT, message)
}

pub(crate) fn unimplemented(what: &str) -> ttrpc::Error {
    status(Code::UNIMPLEMENTED, format!("nacelle does not support {what}"))
}

/// An error without a more specific code.
pub(crate) fn unknown(error: anyhow::Error) -> ttrpc::Error {
    status(Code::UNKNOWN, format!("{error:#}"))
}

pub(crate) fn from_sandbox(error: Error) -> ttrpc::Error {
    let code = match &error {
        Error::NotFound { .. } => Code::NOT_FOUND,
        Error::Exists { .. } => Code::ALREADY_EXISTS,
        Error::InvalidArgument { .. } | Error::Ambiguous { .. } => Code::INVALID_ARGUMENT,
        Error::FailedPrecondition { .. } | Error::NotListening { .. } => Code::FAILED_PRECONDITION,
        Error::Deadline { .. } | Error::ExecTimeout { .. } => Code::DEADLINE_EXCEEDED,
        Error::ResourceExhausted { .. } => Code::RESOURCE_EXHAUSTED,
        Error::OutOfRange { .. } => Code::OUT_OF_RANGE,
        Error::Unavailable { .. } => Code::UNAVAILABLE,
        Error::Cancelled { .. } => Code::CANCELLED,
        Error::Unsupported { .. } => Code::UNIMPLEMENTED,
        Error::Internal(_) => Code::INTERNAL,
    };
    status(code, error.to_string())
}
