//! The node's daemon.

fn main() -> std::process::ExitCode {
    nacelle::daemon::main()
}
