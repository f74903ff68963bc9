//! The byte streams of a process.

use std::pin::Pin;

use tokio::io::{AsyncRead, AsyncWrite};

pub type ByteReader = Pin<Box<dyn AsyncRead + Send>>;
pub type ByteWriter = Pin<Box<dyn AsyncWrite + Send>>;
