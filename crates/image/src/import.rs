//! Import of images from files: OCI layouts (image-spec v1.1, image-layout.md), as a directory or
//! a tar, and `docker save` archives.
//!
//! Nothing is unpacked: members are read at their offset in the tar, and layers are applied
//! directly to the image.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::error::Error;
use crate::flatten::Flattener;
use crate::layer::{EntryKind, TarReader};
use crate::manifest::{Descriptor, Document, Index, Manifest, parse_config};
use crate::path::{shown, split};
use crate::record::{Layer, Record};
use crate::reference::Reference;
use crate::registry::run_blocking;
use crate::state::State;

/// Maximum number of archive members; their names are kept in memory.
const MAX_MEMBERS: usize = 100_000;
/// Maximum length of a chain of links between members (old docker archives share layers by links).
const MAX_LINKS: usize = 8;
/// Index annotations that hold an image's name.
const NAME_ANNOTATIONS: [&str; 2] =
    ["io.containerd.image.name", "org.opencontainers.image.ref.name"];

/// Imports all images in `path`; `name` applies to an archive of one image.
pub async fn import(
    state: Arc<State>,
    path: PathBuf,
    name: Option<Reference>,
) -> Result<Vec<Digest>, Error> {
    let stop = Arc::new(AtomicBool::new(false));
    let _stop = StopOnDrop(Arc::clone(&stop));
    run_blocking(move || {
        let archive = Archive::open(&path)?;
        let images = archive.images(&state)?;
        if images.is_empty() {
            return Err(archive.invalid("it lists no image for linux/amd64"));
        }
        if name.is_some() && images.len() > 1 {
            return Err(archive.invalid("a name was given, but it holds several images"));
        }
        let mut ids = Vec::new();
        for image in images {
            let names = match &name {
                Some(name) => vec![name.clone()],
                None => image.names.clone(),
            };
            ids.push(import_one(&state, &archive, image, &names, &stop)?);
        }
        Ok(ids)
    })
    .await
}

/// An image as described in the archive.
struct ArchivedImage {
    names: Vec<Reference>,
    /// `None` for an artifact.
    config: Option<Vec<u8>>,
    /// Layers: member name and, in an OCI layout, the descriptor.
    layers: Vec<(String, Option<Descriptor>)>,
    manifest: Option<Vec<u8>>,
}

fn import_one(
    state: &Arc<State>,
    archive: &Archive,
    image: ArchivedImage,
    names: &[Reference],
    stop: &Arc<AtomicBool>,
) -> Result<Digest, Error> {
    let what = archive.path.display().to_string();
    let manifest = image.manifest.as_deref().map(Digest::of);
    let (id, diff_ids) = match &image.config {
        Some(config) => {
            let (_, diff_ids) = parse_config(config, image.layers.len(), &what)?;
            (Digest::of(config), diff_ids.into_iter().map(Some).collect())
        }
        None => {
            let id = manifest.ok_or_else(|| archive.invalid("it has no configuration"))?;
            (id, vec![None; image.layers.len()])
        }
    };
    let building = state.build_lock(id);
    let _building = building.blocking_lock();
    let here = state.change(|store| store.cancel_removal(&id))?;
    if !here {
        let temporary = state.temporary()?;
        let mut flattener =
            Flattener::create(&temporary.rootfs(), state.config.limits(), Arc::clone(stop))
                .map_err(|e| Error::data(&what, e))?;
        let mut layers = Vec::new();
        for ((member, descriptor), diff_id) in image.layers.iter().zip(&diff_ids) {
            let (blob, size) = archive.member(member)?;
            let digest = descriptor.as_ref().map(|d| d.digest).or(*diff_id);
            let digest = digest.ok_or_else(|| archive.invalid("a layer has no digest"))?;
            if diff_id.is_none() {
                archive.check(member, &digest)?;
            }
            if let Some(expected) = descriptor.as_ref().map(|d| d.size).filter(|&s| s != size) {
                return Err(Error::SizeMismatch { what: member.clone(), expected, got: size });
            }
            layers.push(Layer { digest, size });
            // The uncompressed layer is verified against the configuration, whose digest is the
            // image id; the digest of the compressed form is not needed.
            flattener.layer(blob, diff_id.as_ref()).map_err(|e| Error::layer(digest, e))?;
        }
        let summary = flattener.finish(&id).map_err(|e| Error::data(&what, e))?;
        let mut record = Record::new(id, manifest, layers, false);
        record.rootfs_bytes = summary.bytes;
        record.inodes = summary.inodes;
        record.artifact = image.config.is_none();
        let _config = image.config.as_deref().map(|c| state.content.put(c)).transpose()?;
        let _manifest = image.manifest.as_deref().map(|m| state.content.put(m)).transpose()?;
        state.change(|store| store.publish(temporary, record))?;
    }
    let mut all: Vec<String> = names.iter().map(Reference::to_string).collect();
    if let Some(manifest) = manifest {
        all.extend(names.iter().map(|name| name.with_digest(manifest).to_string()));
    }
    // The image was removed between the two steps.
    if state.change(|store| store.tag(&id, &all))? { Ok(id) } else { Err(Error::Cancelled) }
}

struct Archive {
    path: PathBuf,
    /// Offset and length of a tar's members; `None` for a directory.
    members: Option<HashMap<String, Member>>,
}

enum Member {
    File { offset: u64, size: u64 },
    Link(String),
}

/// An entry of `manifest.json` in a docker archive.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Archive {
    fn open(path: &Path) -> Result<Self, Error> {
        let metadata = std::fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
        let mut archive = Self { path: path.into(), members: None };
        if metadata.is_dir() {
            return Ok(archive);
        }
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        archive.members = Some(archive.scan(file)?);
        Ok(archive)
    }

    fn scan(&self, mut file: File) -> Result<HashMap<String, Member>, Error> {
        let mut start = [0; 6];
        let read = file.read(&mut start).map_err(|e| Error::io("read", &self.path, e))?;
        if matches!(&start[..read], [0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd, ..]) {
            return Err(self.invalid("it is compressed; decompress it first"));
        }
        file.rewind().map_err(|e| Error::io("read", &self.path, e))?;
        let mut members = HashMap::new();
        let mut tar = TarReader::new(Positioned { file: BufReader::new(file), position: 0 });
        loop {
            let entry = match tar.next() {
                Ok(Some(entry)) => entry,
                Ok(None) => break,
                Err(e) => return Err(self.invalid(&e.to_string())),
            };
            let Ok(name) = normal(&entry.path) else { continue };
            let member = match entry.kind {
                EntryKind::File if !entry.is_sparse() => {
                    Member::File { offset: tar.get_ref().position, size: entry.size }
                }
                EntryKind::HardLink => match normal(&entry.link) {
                    Ok(target) => Member::Link(target),
                    Err(_) => continue,
                },
                EntryKind::Symlink => match resolve_link(&name, &entry.link) {
                    Some(target) => Member::Link(target),
                    None => continue,
                },
                _ => continue,
            };
            members.insert(name, member);
            if members.len() > MAX_MEMBERS {
                return Err(self.invalid("it has too many members"));
            }
            let rest = tar.take_rest();
            tar.get_mut().skip(rest).map_err(|e| Error::io("read", &self.path, e))?;
        }
        Ok(members)
    }

    fn invalid(&self, reason: &str) -> Error {
        Error::NotAnArchive { path: self.path.clone(), reason: reason.into() }
    }

    fn has(&self, name: &str) -> bool {
        match &self.members {
            Some(members) => members.contains_key(name),
            None => self.path.join(name).is_file(),
        }
    }

    /// Opens a member; returns its reader and size.
    fn member(&self, name: &str) -> Result<(BufReader<std::io::Take<File>>, u64), Error> {
        let name = normal(name.as_bytes())?;
        let open = |path: &Path| File::open(path).map_err(|e| Error::io("open", path, e));
        let Some(members) = &self.members else {
            let file = open(&self.path.join(&name))?;
            let size = file.metadata().map_err(|e| Error::io("read", &self.path, e))?.len();
            return Ok((BufReader::with_capacity(256 << 10, file.take(size)), size));
        };
        let mut at = name.clone();
        for _ in 0..MAX_LINKS {
            match members.get(&at) {
                Some(Member::Link(target)) => at.clone_from(target),
                Some(&Member::File { offset, size }) => {
                    let mut file = open(&self.path)?;
                    file.seek(SeekFrom::Start(offset))
                        .map_err(|e| Error::io("read", &self.path, e))?;
                    return Ok((BufReader::with_capacity(256 << 10, file.take(size)), size));
                }
                None => break,
            }
        }
        Err(self.invalid(&format!("it has no member {:?}", shown(name.as_bytes()))))
    }

    /// Reads a whole member and verifies its digest.
    fn check(&self, name: &str, expected: &Digest) -> Result<(), Error> {
        let (mut reader, _) = self.member(name)?;
        let mut hash = Sha256::new();
        std::io::copy(&mut reader, &mut hash).map_err(|e| Error::io("read", &self.path, e))?;
        let got = Digest::from_hash(hash.finalize().into());
        if got == *expected {
            return Ok(());
        }
        Err(Error::DigestMismatch { what: name.into(), expected: *expected, got })
    }

    fn small(&self, state: &State, name: &str) -> Result<Vec<u8>, Error> {
        let (mut reader, size) = self.member(name)?;
        let limit = state.config.max_manifest_bytes;
        if size > limit {
            let what = format!("the size of {name}");
            return Err(Error::TooLarge { what, got: size, limit, setting: "max_manifest_bytes" });
        }
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).map_err(|e| Error::io("read", &self.path, e))?;
        Ok(bytes)
    }

    fn blob(&self, state: &State, digest: &Digest) -> Result<Vec<u8>, Error> {
        let name = format!("blobs/sha256/{}", digest.hex());
        let bytes = self.small(state, &name)?;
        let got = Digest::of(&bytes);
        if got != *digest {
            return Err(Error::DigestMismatch { what: name, expected: *digest, got });
        }
        Ok(bytes)
    }

    fn images(&self, state: &State) -> Result<Vec<ArchivedImage>, Error> {
        // Newer dockers write both. The index is complete, but only manifest.json has the names
        // with their registries.
        if self.has("manifest.json") {
            let bytes = self.small(state, "manifest.json")?;
            let list: Vec<DockerImage> = serde_json::from_slice(&bytes)
                .map_err(|e| self.invalid(&format!("manifest.json: {e}")))?;
            return list.into_iter().map(|image| self.docker_image(state, image)).collect();
        }
        if self.has("index.json") {
            let bytes = self.small(state, "index.json")?;
            let index: Index = serde_json::from_slice(&bytes)
                .map_err(|e| self.invalid(&format!("index.json: {e}")))?;
            return index
                .manifests
                .iter()
                .filter_map(|d| self.oci_image(state, d).transpose())
                .collect();
        }
        Err(self.invalid("it has neither an index.json nor a manifest.json"))
    }

    fn docker_image(&self, state: &State, image: DockerImage) -> Result<ArchivedImage, Error> {
        let tags = image.repo_tags.unwrap_or_default();
        Ok(ArchivedImage {
            names: tags.iter().map(|tag| tag.parse()).collect::<Result<_, _>>()?,
            config: Some(self.small(state, &image.config)?),
            layers: image.layers.into_iter().map(|layer| (layer, None)).collect(),
            manifest: None,
        })
    }

    /// `None` for images of other platforms.
    fn oci_image(&self, state: &State, entry: &Descriptor) -> Result<Option<ArchivedImage>, Error> {
        let what = self.path.display().to_string();
        if entry.platform.as_ref().is_some_and(|p| p.os != "linux" || p.architecture != "amd64") {
            return Ok(None);
        }
        let mut bytes = self.blob(state, &entry.digest)?;
        let manifest: Manifest = match Document::parse(&bytes, &entry.media_type, &what)? {
            Document::Manifest(manifest) => manifest,
            Document::Index(index) => {
                bytes = self.blob(state, &index.select(&what)?.digest)?;
                match Document::parse(&bytes, "", &what)? {
                    Document::Manifest(manifest) => manifest,
                    Document::Index(_) => return Err(self.invalid("it has nested indexes")),
                }
            }
        };
        manifest.check(&what, &state.config)?;
        let names = NAME_ANNOTATIONS.iter().find_map(|key| entry.annotations.as_ref()?.get(*key));
        // Many tools write a bare tag there, which is no reference.
        let names = names.filter(|name| name.contains(['/', ':'])).map(|name| name.parse());
        Ok(Some(ArchivedImage {
            names: names.into_iter().collect::<Result<_, _>>()?,
            config: match manifest.is_artifact() {
                true => None,
                false => Some(self.blob(state, &manifest.config.digest)?),
            },
            layers: manifest
                .layers
                .into_iter()
                .map(|layer| (format!("blobs/sha256/{}", layer.digest.hex()), Some(layer)))
                .collect(),
            manifest: Some(bytes),
        }))
    }
}

/// A member's normalised name.
fn normal(path: &[u8]) -> Result<String, Error> {
    let invalid = |reason: String| Error::InvalidImage { what: "the archive".into(), reason };
    let components = split(path).map_err(|e| invalid(e.to_string()))?;
    String::from_utf8(components.join(&b'/')).map_err(|e| invalid(e.to_string()))
}

/// Resolves the target of a symlink member relative to the archive's root.
fn resolve_link(name: &str, target: &[u8]) -> Option<String> {
    let target = std::str::from_utf8(target).ok()?;
    let mut parts: Vec<&str> = name.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// A reader that counts its position in the file.
struct Positioned {
    file: BufReader<File>,
    position: u64,
}

impl Read for Positioned {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.position += read as u64;
        Ok(read)
    }
}

impl Positioned {
    fn skip(&mut self, bytes: u64) -> std::io::Result<()> {
        let offset = i64::try_from(bytes).map_err(|_| std::io::ErrorKind::InvalidData)?;
        self.file.seek_relative(offset)?;
        self.position += bytes;
        Ok(())
    }
}

struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
