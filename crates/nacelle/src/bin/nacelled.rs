//! The CRI daemon.

fn main() -> std::process::ExitCode {
    nacelle::daemon::main()
}
