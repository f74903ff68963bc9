//! The command line client.

fn main() -> std::process::ExitCode {
    nacelle::cli::main()
}
