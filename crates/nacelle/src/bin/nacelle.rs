//! The command for people.

fn main() -> std::process::ExitCode {
    nacelle::cli::main()
}
