//! Chores of the repository that are more than a shell line: the lab (an outer virtual machine
//! with a true KVM in it), the guest kernel, the guest image, and the rules a program can check.
//! `make help` lists the doors; each is a subcommand here.

use clap::Parser;

mod checks;
mod cpio;
mod debian_kernel;
mod debs;
mod fuzz;
mod guest_image;
mod guest_kernel;
mod images;
mod install;
mod kvm;
mod lab;
mod messages;
mod module_cycles;
mod module_uses;
mod package;
mod paths;
mod run;
mod stories;

#[derive(Parser)]
#[command(about = "Chores of the nacelle repository")]
enum Cli {
    /// Run a command in the lab, or on this host where its KVM is good
    Lab(lab::Args),
    /// Tell the stories (end-to-end tests), on this host or in labs side by side
    Stories(stories::Args),
    /// Build the guest kernel into build/guest/vmlinux
    GuestKernel(guest_kernel::Args),
    /// Pack the agent into build/guest/initramfs.cpio
    GuestImage(guest_image::Args),
    /// Fetch Debian's cloud kernel into build/guest/debian
    DebianKernel,
    /// Make the images of tests and demo in build/images
    Images,
    /// Say whether this host's KVM can run the tests: prints "host" or "lab"
    Where,
    /// Run every fuzz target for a while
    Fuzz(fuzz::Args),
    /// Copy what a node needs to its places
    Install(install::Args),
    /// Build the Debian packages into build/deb
    Deb(package::Args),
    /// Build the RPM packages into build/rpm
    Rpm(package::Args),
    /// Install, upgrade and remove the Debian packages in a lab with systemd
    PackageTest(package::TestArgs),
    /// Check the rules that the compiler does not know
    Check,
}

fn main() {
    let result = match Cli::parse() {
        Cli::Lab(args) => lab::run(&args),
        Cli::Stories(args) => stories::run(&args),
        Cli::GuestKernel(args) => guest_kernel::run(&args),
        Cli::GuestImage(args) => guest_image::run(&args),
        Cli::DebianKernel => debian_kernel::run(),
        Cli::Images => images::run(),
        Cli::Where => kvm::run(),
        Cli::Fuzz(args) => fuzz::run(&args),
        Cli::Install(args) => install::run(&args),
        Cli::Deb(args) => package::deb(&args),
        Cli::Rpm(args) => package::rpm(&args),
        Cli::PackageTest(args) => package::test(&args),
        Cli::Check => checks::run(),
    };
    match result {
        Ok(status) => std::process::exit(status),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            std::process::exit(lab::STATUS_LAB_FAILED);
        }
    }
}
