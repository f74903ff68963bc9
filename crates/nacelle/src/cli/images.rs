//! `nacelle pull`, `images`, `rmi`, `import`.

use std::io::{IsTerminal, Write};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use cri::v1;

use super::arguments::Output;
use super::connect::{Client, call_error};
use super::table::{self, bytes, short};
use crate::api::{ImportRequest, PullProgress, PullRequest};

pub(super) async fn pull(
    client: &mut Client,
    image: &str,
    username: Option<String>,
    password: Option<String>,
) -> Result<()> {
    let id =
        fetch(client, image, username.unwrap_or_default(), password.unwrap_or_default()).await?;
    crate::say(format_args!("{id}"))?;
    Ok(())
}

/// Pulls an image and returns its id. Shows progress on a terminal.
pub(super) async fn fetch(
    client: &mut Client,
    image: &str,
    username: String,
    password: String,
) -> Result<String> {
    let request = PullRequest { image: image.into(), username, password };
    let mut steps = client.debug.pull(request).await.map_err(call_error)?.into_inner();
    let on_terminal = std::io::stderr().is_terminal();
    let clear = || {
        if on_terminal {
            eprint!("\r\x1b[K");
        }
    };
    // nacelled reports changes only, and a registry that cannot be reached causes none.
    if on_terminal {
        eprint!("{image}: resolving");
    }
    loop {
        match steps.message().await {
            Ok(Some(step)) if !step.image_id.is_empty() => {
                clear();
                return Ok(step.image_id);
            }
            Ok(Some(step)) => {
                if on_terminal {
                    clear();
                    eprint!("{image}: {}", progress(&step));
                    std::io::stderr().flush()?;
                }
            }
            Ok(None) => bail!("pulling {image}: nacelled ended the call without a result"),
            Err(status) => {
                clear();
                return Err(call_error(status).context(format!("pulling {image}")));
            }
        }
    }
}

fn progress(step: &PullProgress) -> String {
    let (mut size, mut done, mut whole) = (0, 0, 0);
    for layer in &step.layers {
        size += layer.size;
        done += layer.fetched;
        whole += usize::from(layer.applied >= layer.size);
    }
    if size == 0 {
        return step.phase.clone();
    }
    const CELLS: u64 = 20;
    let filled = (done.min(size) * CELLS / size) as usize;
    let bar = "#".repeat(filled) + &".".repeat(CELLS as usize - filled);
    let layers = step.layers.len();
    format!("{} [{bar}] {} of {}, {whole}/{layers} layers", step.phase, bytes(done), bytes(size))
}

pub(super) async fn list(client: &mut Client, output: Output) -> Result<()> {
    let reply =
        client.images.list_images(v1::ListImagesRequest::default()).await.map_err(call_error)?;
    let images = reply.into_inner().images;
    if output == Output::Json {
        let list: Vec<serde_json::Value> = images
            .iter()
            .map(|image| {
                serde_json::json!({
                    "id": image.id, "tags": image.repo_tags, "digests": image.repo_digests,
                    "size": image.size,
                })
            })
            .collect();
        return Ok(table::json(&list.into())?);
    }
    let mut rows = Vec::new();
    for image in &images {
        let mut names = image.repo_tags.clone();
        if names.is_empty() {
            names.push(image.repo_digests.first().cloned().unwrap_or_else(|| "<none>".into()));
        }
        for name in names {
            rows.push(vec![name, short(&image.id).to_string(), bytes(image.size)]);
        }
    }
    Ok(table::print(&["IMAGE", "ID", "SIZE"], &rows)?)
}

/// The image, if it is on the node.
pub(super) async fn lookup(client: &mut Client, image: &str) -> Result<Option<v1::Image>> {
    let spec = v1::ImageSpec { image: image.into(), ..Default::default() };
    let request = v1::ImageStatusRequest { image: Some(spec), verbose: false };
    Ok(client.images.image_status(request).await.map_err(call_error)?.into_inner().image)
}

pub(super) async fn remove(client: &mut Client, image: &str) -> Result<()> {
    if lookup(client, image).await?.is_none() {
        bail!("no such image: {image} (`nacelle images` lists all)");
    }
    let spec = v1::ImageSpec { image: image.into(), ..Default::default() };
    let request = v1::RemoveImageRequest { image: Some(spec) };
    client.images.remove_image(request).await.map(drop).map_err(call_error)
}

pub(super) async fn import(client: &mut Client, path: &Path, name: Option<String>) -> Result<()> {
    let path = path.canonicalize().with_context(|| path.display().to_string())?;
    let text = path.to_str().ok_or_else(|| anyhow!("{}: not UTF-8", path.display()))?;
    let request = ImportRequest { path: text.into(), name: name.unwrap_or_default() };
    let reply = client.debug.import(request).await.map_err(call_error)?.into_inner();
    for id in reply.image_ids {
        crate::say(format_args!("{id}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Layer;

    #[test]
    fn progress_shows_bytes_and_complete_layers() {
        let layer =
            |size, fetched, applied| Layer { digest: String::new(), size, fetched, applied };
        let step = PullProgress {
            phase: "fetching".into(),
            layers: vec![layer(100, 100, 100), layer(100, 0, 0)],
            image_id: String::new(),
        };
        assert_eq!(progress(&step), "fetching [##########..........] 100 B of 200 B, 1/2 layers");
        let start = PullProgress { phase: "resolving".into(), ..Default::default() };
        assert_eq!(progress(&start), "resolving");
    }
}
