//! The helper processes by their verbs.

use super::helper::{REQUEST_ENV, become_helper};
use super::{create, exec, pod_pid, userns};

/// Entry point of helpers. Returns if the process is not one.
pub fn main_if_helper() {
    let (Some(verb), Ok(request)) = (std::env::args().nth(1), std::env::var(REQUEST_ENV)) else {
        return;
    };
    match verb.as_str() {
        create::VERB => become_helper(&request, create::main),
        exec::VERB => become_helper(&request, exec::main),
        pod_pid::VERB => become_helper(&request, pod_pid::main),
        userns::VERB => become_helper(&request, userns::main),
        _ => {}
    }
}
