//! A reply of several messages.

use std::pin::Pin;

use futures_util::Stream;
use tonic::Status;

pub(super) type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
