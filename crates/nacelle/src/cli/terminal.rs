//! Raw mode of the terminal.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Restores the terminal's settings when dropped, also on a panic.
pub(super) struct Raw(Termios);

impl Raw {
    pub(super) fn enable() -> io::Result<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // There is no way to handle a failure here.
        let _ = tcsetattr(io::stdin().as_fd(), SetArg::TCSADRAIN, &self.0);
    }
}

pub(super) fn is_terminal() -> bool {
    io::stdin().is_terminal()
}

/// Columns and rows.
pub(super) fn size() -> Option<(u16, u16)> {
    terminal_size::terminal_size().map(|(width, height)| (width.0, height.0))
}
