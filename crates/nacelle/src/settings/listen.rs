//! The address of the metrics endpoint: nothing, a unix socket, or a port of a loopback address.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Listen {
    /// The empty text.
    #[default]
    Off,
    Unix(PathBuf),
    Tcp(SocketAddr),
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListenError {
    #[error("{0:?} is neither \"unix:/absolute/path\" nor \"127.0.0.1:PORT\" nor \"[::1]:PORT\"")]
    Syntax(String),
    #[error(
        "{0:?} is not an absolute path that can be a socket: write \"unix:/run/nacelle/metrics.sock\""
    )]
    Path(String),
    #[error(
        "{0} is not a loopback address: the metrics are served without authentication and encryption; \
         use a unix socket or 127.0.0.1, and a proxy or an agent for access from other hosts"
    )]
    NotLoopback(SocketAddr),
    #[error("{0}: port 0 is no fixed port, so a scraper would not find it")]
    NoPort(SocketAddr),
}

impl TryFrom<String> for Listen {
    type Error = ListenError;

    fn try_from(text: String) -> Result<Self, ListenError> {
        if text.is_empty() {
            return Ok(Self::Off);
        }
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path);
            if !path.is_absolute() || path.file_name().is_none() {
                return Err(ListenError::Path(text));
            }
            return Ok(Self::Unix(path));
        }
        let address: SocketAddr = match text.parse() {
            Ok(address) => address,
            Err(_) => return Err(ListenError::Syntax(text)),
        };
        if !address.ip().to_canonical().is_loopback() {
            return Err(ListenError::NotLoopback(address));
        }
        if address.port() == 0 {
            return Err(ListenError::NoPort(address));
        }
        Ok(Self::Tcp(address))
    }
}

impl FromStr for Listen {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, ListenError> {
        text.to_owned().try_into()
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => Ok(()),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

impl From<Listen> for String {
    fn from(listen: Listen) -> Self {
        listen.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Listen, ListenError> {
        text.parse()
    }

    #[test]
    fn unix_sockets_and_loopback_addresses_are_accepted_and_keep_their_text() {
        for text in
            ["", "unix:/run/nacelle/metrics.sock", "127.0.0.1:9750", "127.9.9.9:1", "[::1]:9750"]
        {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn everything_else_is_refused_with_the_reason() {
        for (text, reason) in [
            ("0.0.0.0:9750", "not a loopback address"),
            ("[::]:9750", "not a loopback address"),
            ("192.168.1.1:9750", "not a loopback address"),
            ("[::ffff:10.0.0.1]:9750", "not a loopback address"),
            ("127.0.0.1:0", "port 0"),
            ("127.0.0.1", "neither"),
            (":9750", "neither"),
            ("localhost:9750", "neither"),
            ("http://127.0.0.1:9750", "neither"),
            ("/run/nacelle/metrics.sock", "neither"),
            ("unix:metrics.sock", "absolute path"),
            ("unix:", "absolute path"),
            ("unix:/", "absolute path"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
