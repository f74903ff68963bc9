//! `nacelle console`.

use std::io::Write;

use anyhow::Result;

use super::connect::{Client, call_error};
use super::find;
use crate::api::ConsoleRequest;

pub(super) async fn console(client: &mut Client, pod: &str, follow: bool) -> Result<()> {
    let pod = find::pod(client, pod).await?.id;
    let request = ConsoleRequest { pod, from: 0, follow };
    let mut chunks = client.debug.console(request).await.map_err(call_error)?.into_inner();
    let mut out = std::io::stdout();
    while let Some(chunk) = chunks.message().await.map_err(call_error)? {
        out.write_all(&chunk.data)?;
        out.flush()?;
    }
    Ok(())
}
