//! `nacelle wait`.

use std::time::Duration;

use anyhow::Result;
use cri::v1::ContainerState;

use super::connect::Client;
use super::{find, logs};

/// Between two status requests.
const INTERVAL: Duration = Duration::from_millis(100);

/// Prints the exit code of each container, in the order of the names.
pub(super) async fn wait(client: &mut Client, names: &[String]) -> Result<()> {
    let mut ids = Vec::new();
    for name in names {
        ids.push(find::container(client, name).await?.id);
    }
    for id in ids {
        let code = loop {
            let status = logs::status(client, &id).await?;
            if status.state == ContainerState::ContainerExited as i32 {
                break status.exit_code;
            }
            tokio::time::sleep(INTERVAL).await;
        };
        crate::say(format_args!("{code}"))?;
    }
    Ok(())
}
