//! One pull: manifest, configuration, layers in parallel; the image is built from the complete
//! layers while others are still fetched.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;

use crate::content::Lease;
use crate::digest::Digest;
use crate::erofs::Summary;
use crate::error::Error;
use crate::flatten::Flattener;
use crate::manifest::{Descriptor, Document, MAX_NESTING, Manifest, parse_config};
use crate::observe::Arrivals;
use crate::progress::{Phase, Tracker};
use crate::record::{Layer, Record};
use crate::reference::{Reference, Target};
use crate::registry::{Auth, Session, run_blocking};
use crate::state::State;
use crate::store::Temporary;

/// Pulls `reference` and returns the image's id.
pub async fn pull(
    state: Arc<State>,
    reference: Reference,
    auth: Auth,
    tracker: Tracker,
) -> Result<Digest, Error> {
    let what = reference.to_string();
    let (opening, name) = (Arc::clone(&state), reference.clone());
    let session = run_blocking(move || opening.registries.session(&name, &auth)).await?;
    let session = Arc::new(session);
    let top = session.manifest(&reference.target).await?;
    let top_digest = top.digest;
    let mut document = top;
    let mut depth = 0;
    let (manifest_bytes, manifest) = loop {
        match Document::parse(&document.bytes, &document.content_type, &what)? {
            Document::Manifest(manifest) => break (document.bytes, manifest),
            Document::Index(_) if depth == MAX_NESTING => {
                let reason = format!("its index points to an index {MAX_NESTING} times");
                return Err(Error::InvalidImage { what, reason });
            }
            Document::Index(index) => {
                depth += 1;
                let chosen = index.select(&what)?.digest;
                document = session.manifest(&Target::Digest(chosen)).await?;
            }
        }
    };
    manifest.check(&what, &state.config)?;
    let id = manifest.id(&manifest_bytes);
    // The digest that the tag resolves to now.
    let mut names = vec![reference.with_digest(top_digest).to_string()];
    if let Target::Tag(_) = reference.target {
        names.push(reference.to_string());
    }

    // Two names of one image that are pulled concurrently build it once.
    let building = state.build_lock(id);
    let _building = building.lock().await;
    let here = Arc::clone(&state);
    if !run_blocking(move || here.change(|store| store.cancel_removal(&id))).await? {
        build(&state, &session, id, &manifest, manifest_bytes, &what, &tracker).await?;
    }
    let tagging = Arc::clone(&state);
    if !run_blocking(move || tagging.change(|store| store.tag(&id, &names))).await? {
        // The image was removed between the two steps.
        return Err(Error::Cancelled);
    }
    tracker.phase(Phase::Done);
    tracing::info!(image = %id, reference = %what, "pulled");
    Ok(id)
}

async fn build(
    state: &Arc<State>,
    session: &Arc<Session>,
    id: Digest,
    manifest: &Manifest,
    manifest_bytes: Vec<u8>,
    what: &str,
    tracker: &Tracker,
) -> Result<(), Error> {
    let (config_bytes, diff_ids) = if manifest.is_artifact() {
        (None, vec![None; manifest.layers.len()])
    } else {
        let bytes = session.small_blob(&id, manifest.config.size).await?;
        let (_, diff_ids) = parse_config(&bytes, manifest.layers.len(), what)?;
        (Some(bytes), diff_ids.into_iter().map(Some).collect())
    };
    tracker.layers(manifest.layers.iter().map(|layer| (layer.digest.to_string(), layer.size)));
    tracker.phase(Phase::Fetching);

    let leases: Vec<Lease> =
        manifest.layers.iter().map(|layer| state.content.lease(layer.digest)).collect();
    let blobs: BTreeMap<_, _> = manifest.layers.iter().map(|l| (l.digest, l.size)).collect();
    let content = state.content.clone();
    run_blocking(move || content.check_space(&blobs)).await?;
    let (ready, arrivals): (Vec<_>, Vec<_>) =
        manifest.layers.iter().map(|_| oneshot::channel::<()>()).unzip();
    let mut downloads = JoinSet::new();
    let slots = Arc::new(Semaphore::new(state.config.parallel_layers.max(1)));
    for ((index, layer), ready) in manifest.layers.iter().cloned().enumerate().zip(ready) {
        let (state, session, tracker) = (Arc::clone(state), Arc::clone(session), tracker.clone());
        let slots = Arc::clone(&slots);
        downloads.spawn(async move {
            let _slot = slots.acquire_owned().await.map_err(|_| Error::Cancelled)?;
            fetch_layer(&state, &session, &layer, index, &tracker).await?;
            // A send fails if the builder has stopped; its own error is reported.
            let _ = ready.send(());
            Ok(())
        });
    }

    // Dropped with this future: the builder then fails at its next read.
    let stop = StopOnDrop(Arc::default());
    let making = Arc::clone(state);
    let temporary = run_blocking(move || making.temporary()).await?;
    let mut record = Record::new(
        id,
        Some(Digest::of(&manifest_bytes)),
        manifest
            .layers
            .iter()
            .map(|layer| Layer { digest: layer.digest, size: layer.size })
            .collect(),
        state.config.keep_layers,
    );
    record.artifact = manifest.is_artifact();
    let job = Build {
        state: Arc::clone(state),
        layers: manifest.layers.iter().map(|layer| layer.digest).zip(diff_ids).collect(),
        arrivals,
        tracker: tracker.clone(),
        stop: Arc::clone(&stop.0),
        id,
        // The files must stay until the builder's thread has ended.
        _leases: leases,
    };
    let mut builder = tokio::task::spawn_blocking(move || {
        let mut job = job;
        let summary = job.run(&temporary)?;
        Ok::<_, Error>((temporary, summary, job))
    });
    let built = loop {
        tokio::select! {
            // Downloads first: a failed download also ends the builder, whose error has no cause.
            biased;
            Some(done) = downloads.join_next(), if !downloads.is_empty() => {
                done.map_err(|_| Error::Cancelled)??;
                if downloads.is_empty() {
                    tracker.phase(Phase::Building);
                }
            }
            built = &mut builder => break built,
        }
    };
    let (temporary, summary, job) = match built.map_err(|_| Error::Cancelled)? {
        Ok(built) => built,
        Err(Error::Cancelled) => {
            while let Some(done) = downloads.join_next().await {
                done.map_err(|_| Error::Cancelled)??;
            }
            return Err(Error::Cancelled);
        }
        Err(e) => return Err(e),
    };
    record.rootfs_bytes = summary.bytes;
    record.inodes = summary.inodes;
    let state = Arc::clone(state);
    run_blocking(move || {
        // Leases until the record has its own.
        let _config = config_bytes.map(|bytes| state.content.put(&bytes)).transpose()?;
        let _manifest = state.content.put(&manifest_bytes)?;
        let published = state.change(|store| store.publish(temporary, record));
        drop(job);
        published
    })
    .await
}

async fn fetch_layer(
    state: &State,
    session: &Session,
    layer: &Descriptor,
    index: usize,
    tracker: &Tracker,
) -> Result<(), Error> {
    // Another pull may fetch this layer now, or this image may contain it twice.
    let lock = state.blob_lock(layer.digest);
    let _locked = lock.lock().await;
    if !state.content.has(&layer.digest, layer.size) {
        let arrivals = Arrivals::new(&*state.observer);
        let progress = |bytes| {
            arrivals.at(bytes);
            tracker.fetched(index, bytes);
        };
        let durable = state.config.keep_layers;
        session.blob(&layer.digest, layer.size, &state.content, durable, &progress).await?;
    }
    tracker.fetched(index, layer.size);
    Ok(())
}

/// The blocking part of a pull: builds the image.
struct Build {
    state: Arc<State>,
    /// Digest of the blob and, if known, of its uncompressed content.
    layers: Vec<(Digest, Option<Digest>)>,
    arrivals: Vec<oneshot::Receiver<()>>,
    tracker: Tracker,
    stop: Arc<AtomicBool>,
    id: Digest,
    _leases: Vec<Lease>,
}

impl Build {
    fn run(&mut self, temporary: &Temporary) -> Result<Summary, Error> {
        let limits = self.state.config.limits();
        let what = format!("image {}", self.id);
        let mut flattener = Flattener::create(&temporary.rootfs(), limits, Arc::clone(&self.stop))
            .map_err(|e| Error::data(&what, e))?;
        let arrivals = std::mem::take(&mut self.arrivals);
        for (index, ((digest, diff_id), arrival)) in self.layers.iter().zip(arrivals).enumerate() {
            // Closed if the download failed, which ends the pull.
            arrival.blocking_recv().map_err(|_| Error::Cancelled)?;
            let file = self.state.content.open_blob(digest)?;
            let report = |bytes| self.tracker.applied(index, bytes);
            let file = BufReader::with_capacity(256 << 10, file);
            let blob = Counted { file, read: 0, report: &report };
            let applied = flattener.layer(blob, diff_id.as_ref()).map_err(|e| {
                // Kept layers are trusted by their length alone; after a failure the digest is
                // verified, and a bad one is fetched again.
                if self.state.config.keep_layers {
                    self.state.content.verify_digest(digest);
                }
                Error::layer(*digest, e)
            })?;
            report(self.state.content.size(digest));
            tracing::debug!(layer = %digest, entries = applied.entries,
                dropped_xattrs = applied.dropped_xattrs, "layer applied");
        }
        flattener.finish(&self.id).map_err(|e| Error::data(&what, e))
    }
}

/// Sets the builder's stop flag when dropped.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A layer's blob; counts the bytes read.
struct Counted<'a> {
    file: BufReader<File>,
    read: u64,
    report: &'a dyn Fn(u64),
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.consume_count(read);
        Ok(read)
    }
}

impl BufRead for Counted<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.file.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        self.file.consume(amount);
        self.consume_count(amount);
    }
}

impl Counted<'_> {
    fn consume_count(&mut self, amount: usize) {
        // Reported in steps: each report wakes the receivers.
        const STEP: u64 = 256 << 10;
        let before = self.read;
        self.read += amount as u64;
        if before / STEP != self.read / STEP {
            (self.report)(self.read);
        }
    }
}
