//! A wave in progress on disk, so that a run that was stopped goes on with the layer it was in.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use burn::tensor::{Device, Tensor};
use moe_checkpoint::{check_space, write_renamed};
use serde_json::{Value, json};

use super::{Engine, WaveReport, prepare::Prepared};
use crate::{
    adapters::Depth,
    data::Wave,
    error::{Error, Result},
    objective::CrossEntropy,
    trace::{Observer, Signals, SweepPart},
    wave_files::{Part, WaveFiles, Writer, is_whole, load},
};

const MARK: &str = "wave.json";
const LOSS: &str = "loss.json";
const VERSION: u64 = 1;
/// How long a wave runs before it leaves files, where what is in them stays in memory anyway.
const HELD: Duration = Duration::from_secs(10);

/// A directory with what a sweep over one wave has left so far: the inputs of the layers that the backward sweep comes
/// back to, and the point the sweep has reached. [`Engine::unfinished`] makes or finds it, [`Engine::go_on`] adds to
/// it; whoever keeps the results [removes](Self::remove) it.
///
/// Files are written in a thread of their own while the sweep goes on, so that a sweep that is killed may do a part or
/// two again. Where layer inputs stay in memory, none are written in the first ten seconds of a wave: a short wave is
/// computed again sooner than its files are written. A sweep that stops with an error writes what waits. Each file is
/// written beside its place and renamed; the last one of a part of the sweep says that the part is done. Files are not
/// synced, which a killed process does not need; what a power cut has left of them is found by length and checksum.
#[derive(Debug)]
pub struct UnfinishedWave {
    dir: PathBuf,
    mark: Value,
    layers: usize,
    /// Sums of every layer that a norm comes after.
    sums: Vec<usize>,
    done: Option<SweepPart>,
    /// Who writes, from the first file on.
    files: OnceLock<Arc<WaveFiles>>,
}

impl UnfinishedWave {
    /// The directory. Observers may keep what is theirs in it, under other names than `*.f32`, `wave.json` and
    /// `loss.json`.
    pub fn directory(&self) -> &Path {
        &self.dir
    }

    /// Decoder layers of the model.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// The last part of the sweep that is done; nothing at the start of a wave.
    pub fn done(&self) -> Option<SweepPart> {
        self.done
    }

    /// Forgets what was done: the wave begins anew.
    ///
    /// # Errors
    /// [`Error::Spill`].
    pub fn restart(&mut self) -> Result<()> {
        self.done = None;
        self.forget_files();
        if self.dir.exists() {
            fs::remove_dir_all(&self.dir).map_err(self.failed())?;
        }
        fs::create_dir_all(&self.dir).map_err(self.failed())?;
        write_renamed(self.dir.join(MARK), &[self.mark.to_string().as_bytes()]).map_err(self.failed())
    }

    /// Deletes the directory: the wave is finished.
    ///
    /// # Errors
    /// [`Error::Spill`].
    pub fn remove(mut self) -> Result<()> {
        self.forget_files();
        fs::remove_dir_all(&self.dir).map_err(self.failed())
    }

    /// Ends the writing of files that are about to be deleted.
    fn forget_files(&mut self) {
        if let Some(files) = self.files.take() {
            files.forget();
        }
    }

    /// Lets files of a wave at its beginning wait for as long as it costs little to compute them again.
    pub(super) fn hold_files(&self) -> Result<()> {
        if self.done.is_none() { self.files().hold(HELD) } else { Ok(()) }
    }

    fn failed(&self) -> impl Fn(std::io::Error) -> Error + '_ {
        |source| Error::Spill { dir: self.dir.clone(), source }
    }

    /// Who writes the files.
    pub(super) fn files(&self) -> &Arc<WaveFiles> {
        self.files.get_or_init(|| Arc::new(WaveFiles::new(self.dir.clone())))
    }

    fn read_json(&self, name: &str) -> Option<Value> {
        serde_json::from_slice(&fs::read(self.dir.join(name)).ok()?).ok()
    }

    fn has(&self, part: Part) -> bool {
        is_whole(&part.path(&self.dir))
    }

    /// What its files say is done: the furthest point of which all is there that the rest of the sweep reads.
    fn found(&self, depth: Depth) -> Option<SweepPart> {
        if self.read_json(MARK).as_ref() != Some(&self.mark) {
            return None;
        }
        let layers = self.layers;
        let waiting = |below: usize| {
            (0..below).all(|layer| {
                let sums = (0..self.sums[layer]).all(|which| self.has(Part::Sum(layer, which)));
                (!depth.reaches_feed_forward(layer) || (sums && self.has(Part::Middle(layer))))
                    && (!depth.reaches_attention(layer) || self.has(Part::Input(layer)))
            })
        };
        if let Some(layer) = (0..=layers).find(|&layer| self.has(Part::Gradient(layer))) {
            let done = if layer == layers { SweepPart::Head } else { SweepPart::Backward(layer) };
            return (waiting(layer) && self.report().is_some()).then_some(done);
        }
        let last = (0..layers).rev().find(|&layer| self.has(Part::Input(layer + 1)))?;
        waiting(last + 1).then_some(SweepPart::Forward(last))
    }

    /// The output of this layer, which is the input of the next.
    pub(super) fn forward_done(&mut self, layer: usize, output: &Tensor<2>, depth: Depth) -> Result<()> {
        self.files().save(Part::Input(layer + 1), output)?;
        if !depth.reaches_attention(layer) {
            self.files().delete(Part::Input(layer))?;
        }
        self.done = Some(SweepPart::Forward(layer));
        Ok(())
    }

    /// The gradient at the output of the last layer, and the losses.
    pub(super) fn head_done(&mut self, gradient: &Tensor<2>, report: &WaveReport) -> Result<()> {
        let bits = |loss: &f64| loss.to_bits();
        let sequences = report.sequence_losses.as_ref().map(|losses| losses.iter().map(bits).collect::<Vec<_>>());
        let losses = json!({ "loss": report.loss.as_ref().map(bits), "sequences": sequences });
        self.files().write(LOSS, losses.to_string().into_bytes())?;
        self.files().save(Part::Gradient(self.layers), gradient)?;
        self.files().delete(Part::Input(self.layers))?;
        self.done = Some(SweepPart::Head);
        Ok(())
    }

    /// The gradient at the input of this layer.
    pub(super) fn backward_done(&mut self, layer: usize, gradient: &Tensor<2>) -> Result<()> {
        self.files().save(Part::Gradient(layer), gradient)?;
        let sums = (0..self.sums[layer]).map(|which| Part::Sum(layer, which));
        for part in [Part::Gradient(layer + 1), Part::Input(layer), Part::Middle(layer)].into_iter().chain(sums) {
            self.files().delete(part)?;
        }
        self.done = Some(SweepPart::Backward(layer));
        Ok(())
    }

    /// The losses that an earlier run computed.
    pub(super) fn report(&self) -> Option<(Option<f64>, Option<Vec<f64>>)> {
        let value = self.read_json(LOSS)?;
        let loss = |value: &Value| value.as_u64().map(f64::from_bits);
        let sequences = value["sequences"].as_array().map(|all| all.iter().filter_map(loss).collect());
        Some((loss(&value["loss"]), sequences))
    }

    pub(super) fn load(&self, part: Part, device: &Device) -> Result<Tensor<2>> {
        load(&part.path(&self.dir), Writer::Earlier, device).map_err(self.failed())
    }
}

impl Engine<'_> {
    /// Opens `directory` for a sweep that may be stopped and gone on with, over `wave` for an observer that needs
    /// `needs`; empty or as an earlier run of the same sweep left it. What another sweep left there is deleted: of
    /// another model, wave or `identity`, which is whatever the observer's results follow from besides. Nothing if the
    /// file system has no room for it, or layers take the keys that a layer before them chose or made, which is logged.
    ///
    /// It needs room for two tensors `[T, H]` per layer that the backward sweep passes (one or two more where norms
    /// come after blocks), and two more.
    ///
    /// # Errors
    /// [`Error::Input`] if parameters are trained, whose gradients no file has, and for an empty wave;
    /// [`Error::Spill`].
    pub fn unfinished(
        &self,
        wave: &Wave,
        needs: Signals,
        directory: &Path,
        identity: &str,
    ) -> Result<Option<UnfinishedWave>> {
        if needs.parameters {
            return Err(Error::input("observer needs", "gradients of parameters", "what can be kept in files"));
        }
        let prepared = Prepared::new(self.model, wave)?;
        if self.model.config().shares_keys() {
            tracing::warn!(
                "wave {}: layers read the keys and values of layers before them; stopped within the wave, a run begins \
                 it anew",
                wave.id
            );
            return Ok(None);
        }
        if let Some(keys) = self.shares_keys().filter(|keys| prepared.spans.iter().any(|s| s.len() > *keys)) {
            // What a layer chose is in no file, and a layer that takes the same keys could not go on without it.
            tracing::warn!(
                "wave {}: layers share the {keys} keys that an indexer chooses; stopped within the wave, a run begins \
                 it anew",
                wave.id
            );
            return Ok(None);
        }
        let (config, depth) = (self.model.config(), self.depth(needs, 0));
        let layers = config.layers.len();
        let sums: Vec<usize> = (0..layers).map(|layer| config.kept_sums(layer)).collect();
        let kept: usize = (0..layers)
            .map(|l| {
                let half = if depth.reaches_feed_forward(l) { 1 + sums[l] } else { 0 };
                half + usize::from(depth.reaches_attention(l))
            })
            .sum();
        let needed = 4 * (prepared.ids.len() * config.stream_width() * (kept + 2)) as u64;
        let parent = directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("."));
        let mut hasher = blake3::Hasher::new();
        let what = json!({
            "version": VERSION, "model": self.model.checkpoint().fingerprint(), "wave": wave.id, "needs": format!("{needs:?}"),
            "head": [self.options.head_tokens, usize::from(self.options.loss)], "by": env!("CARGO_PKG_VERSION"),
            "layers": layers, "identity": identity,
        });
        hasher.update(what.to_string().as_bytes());
        let ids = prepared.ids.iter().flat_map(|id| id.to_le_bytes());
        let ends = prepared.spans.iter().flat_map(|span| (span.end as u64).to_le_bytes());
        let counted = prepared.targets.iter().map(|target| u8::from(target.is_some()));
        hasher.update(&ids.chain(ends).chain(counted).collect::<Vec<u8>>());
        let mark = json!({ "version": VERSION, "wave": wave.id, "digest": hasher.finalize().to_hex().to_string() });
        let mut unfinished =
            UnfinishedWave { dir: directory.to_path_buf(), mark, layers, sums, done: None, files: OnceLock::new() };
        unfinished.done = unfinished.found(depth);
        if unfinished.done.is_none() {
            if let Err(error) = check_space(parent, needed) {
                tracing::warn!("wave {}: {error}; stopped within the wave, a run begins it anew", wave.id);
                if directory.exists() {
                    fs::remove_dir_all(directory).map_err(unfinished.failed())?;
                }
                return Ok(None);
            }
            unfinished.restart()?;
        }
        Ok(Some(unfinished))
    }

    /// Keys that a query sees, where layers take those that a layer before them chose.
    fn shares_keys(&self) -> Option<usize> {
        let config = self.model.config();
        let selection = config.attention.selects.as_ref()?;
        (0..config.layers.len()).any(|layer| selection.is_shared(layer)).then_some(selection.keys)
    }

    /// As [`run`](Self::run), from where `unfinished` is, and leaving there what is needed to go on after every part of
    /// the sweep. The observer is shown the parts that were not done, and [recalls](Observer::recall) the routing of
    /// layers that it sees in the backward sweep only; its results so far it must have kept itself, after each
    /// [`Observer::done`].
    ///
    /// # Errors
    /// As [`run`](Self::run); [`Error::Spill`].
    pub fn go_on(
        &self,
        wave: &Wave,
        observer: &mut dyn Observer,
        unfinished: &mut UnfinishedWave,
    ) -> Result<WaveReport> {
        let head = self.needs_head(observer.needs());
        let mut objective = CrossEntropy;
        self.sweep(wave, observer, head.then_some(&mut objective), Some(unfinished))
    }
}
