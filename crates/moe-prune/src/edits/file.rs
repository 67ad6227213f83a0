//! Edits on disk: a safetensors file of which one expert is read at a time.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use moe_checkpoint::{AtomicFile, write_safetensors};
use safetensors::tensor::{Dtype, Metadata, View};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{EditSizes, EditSource, Edits, ExpertEdit, check_finite};
use crate::{Error, PrunePlan, Result};

/// Metadata key of the JSON document.
const KEY: &str = "moe.edits";
/// Version of the file that is written, and the newest that is read.
const VERSION: u64 = 1;
/// Longest header that is read.
const MAX_HEADER: u64 = 100_000_000;

#[derive(Serialize, Deserialize)]
struct Meta {
    version: u64,
    /// Digest of the plan.
    plan: String,
    /// Digest of the edits.
    digest: String,
    recipe: Value,
}

fn down_name(layer: usize, expert: usize) -> String {
    format!("layer.{layer}.expert.{expert}.down")
}

fn bias_name(layer: usize, expert: usize) -> String {
    format!("layer.{layer}.expert.{expert}.down_bias")
}

fn router_name(layer: usize) -> String {
    format!("layer.{layer}.router")
}

/// A tensor that becomes bytes when it is written.
struct Values<'a> {
    shape: Vec<usize>,
    values: &'a [f32],
}

impl View for Values<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    fn data_len(&self) -> usize {
        4 * self.values.len()
    }
}

/// Writes edits that fit the plan.
pub(super) fn save(edits: &Edits, path: &Path, plan: &PrunePlan) -> Result<()> {
    let hidden = plan.shape.hidden_size;
    let mut tensors: BTreeMap<String, Values<'_>> = BTreeMap::new();
    for ((layer, expert), edit) in edits.experts() {
        if let Some(values) = &edit.down {
            let shape = vec![hidden, values.len() / hidden];
            tensors.insert(down_name(layer, expert), Values { shape, values });
        }
        if let Some(values) = &edit.down_bias {
            tensors.insert(bias_name(layer, expert), Values { shape: vec![hidden], values });
        }
    }
    for (layer, values) in edits.routers() {
        let experts = plan.layer(layer).map_or(1, |kept| kept.experts.len()).max(1);
        tensors.insert(router_name(layer), Values { shape: vec![experts, values.len() / experts], values });
    }
    let meta = Meta { version: VERSION, plan: plan.digest(), digest: edits.digest(), recipe: edits.recipe.clone() };
    let json = serde_json::to_string(&meta).map_err(|error| Error::invalid_edits(error.to_string()))?;
    let metadata = HashMap::from([(KEY.to_string(), json)]);

    let mut file = AtomicFile::create(path)?;
    write_safetensors(&mut file, tensors, Some(metadata))
        .map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
    Ok(file.finish()?)
}

/// A file of [`Edits::save`], of which one expert is read at a time. The file must not change while it is open.
#[derive(Debug)]
pub struct EditsFile {
    path: PathBuf,
    file: Mutex<File>,
    /// First byte and number of values of every tensor.
    places: HashMap<String, (u64, usize)>,
    digest: String,
    recipe: Value,
}

impl EditsFile {
    /// Opens a file and checks that it is of this plan; the values are not read.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::InvalidEdits`] names the file and what is wrong: not such a file, of a newer version, of
    /// another plan, cut off, or a tensor that the plan has no place for, of another shape or dtype.
    pub fn open(path: impl AsRef<Path>, plan: &PrunePlan) -> Result<Self> {
        let path = path.as_ref();
        let io = |source| Error::Io { path: path.to_path_buf(), source };
        let invalid = |reason: String| Error::invalid_edits(reason).in_file(path);
        let mut file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let mut start = [0; 8];
        let mut header = Vec::new();
        let header_bytes = match file.read_exact(&mut start) {
            Ok(()) => u64::from_le_bytes(start),
            Err(_) => return Err(invalid("it is too short for a safetensors file".into())),
        };
        if header_bytes > MAX_HEADER.min(length - 8) {
            return Err(invalid(format!("its header claims {header_bytes} bytes, the file has {length}")));
        }
        file.by_ref().take(header_bytes).read_to_end(&mut header).map_err(io)?;
        let header: Metadata = serde_json::from_slice(&header).map_err(|error| invalid(error.to_string()))?;
        let json = header.metadata().as_ref().and_then(|metadata| metadata.get(KEY));
        let json = json.ok_or_else(|| invalid(format!("its metadata has no key `{KEY}`: another sort of file")))?;
        let version = serde_json::from_str::<Value>(json).ok().and_then(|meta| meta["version"].as_u64());
        if version != Some(VERSION) {
            let found = version.map_or("none".to_string(), |version| version.to_string());
            return Err(invalid(format!("its version is {found}, this crate reads {VERSION}")));
        }
        let meta: Meta = serde_json::from_str(json).map_err(|error| invalid(error.to_string()))?;
        if meta.plan != plan.digest() {
            let (found, expected) = (meta.plan, plan.digest());
            return Err(invalid(format!("it is of the plan with digest {found}, but this one has {expected}")));
        }
        let expected = length - 8 - header_bytes;
        let mut places = HashMap::new();
        let mut allowed = shapes(plan);
        let routers: HashSet<String> = plan.kept.iter().map(|kept| router_name(kept.layer)).collect();
        for (name, info) in header.tensors() {
            let shape = allowed
                .remove(&name)
                .ok_or_else(|| invalid(format!("tensor `{name}` is of no expert or router that the plan keeps")))?;
            // Rows of a router are wider than what experts read where that is a latent of the residual stream.
            let is_wider = || match (&info.shape[..], &shape[..]) {
                ([rows, width], [experts, hidden]) => rows == experts && width > hidden,
                _ => false,
            };
            let fits = info.shape == shape || (routers.contains(&name) && is_wider());
            if info.dtype != Dtype::F32 || !fits {
                let (dtype, found) = (info.dtype, &info.shape);
                return Err(invalid(format!("tensor `{name}` is {dtype} {found:?}, expected F32 {shape:?}")));
            }
            let (begin, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
            let values: usize = info.shape.iter().product();
            if end > expected || end.checked_sub(begin) != Some(4 * values as u64) {
                return Err(invalid(format!("tensor `{name}` is at bytes {begin}..{end} of {expected}: cut off?")));
            }
            places.insert(name, (8 + header_bytes + begin, values));
        }
        let Meta { digest, recipe, .. } = meta;
        Ok(Self { path: path.to_path_buf(), file: Mutex::new(file), places, digest, recipe })
    }

    /// How the edits were made.
    pub fn recipe(&self) -> &Value {
        &self.recipe
    }

    fn read(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(&(begin, values)) = self.places.get(name) else { return Ok(None) };
        let mut bytes = vec![0; 4 * values];
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(begin))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|source| Error::Io { path: self.path.clone(), source })?;
        let values: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        check_finite(&values, || format!("tensor `{name}`")).map_err(|error| error.in_file(&self.path))?;
        Ok(Some(values))
    }
}

impl EditSource for EditsFile {
    fn expert(&self, layer: usize, expert: usize) -> Result<Option<ExpertEdit>> {
        let (down, down_bias) = (self.read(&down_name(layer, expert))?, self.read(&bias_name(layer, expert))?);
        let edit = ExpertEdit { down, down_bias };
        Ok(if edit.is_empty() { None } else { Some(edit) })
    }

    fn router(&self, layer: usize) -> Result<Option<Vec<f32>>> {
        self.read(&router_name(layer))
    }

    fn digest(&self) -> String {
        self.digest.clone()
    }

    fn sizes(&self, layer: usize, expert: usize) -> Result<EditSizes> {
        let size = |name: String| self.places.get(&name).map(|(_, values)| *values);
        Ok(EditSizes { down: size(down_name(layer, expert)), down_bias: size(bias_name(layer, expert)) })
    }
}

/// Shapes of all tensors that edits of this plan may have.
fn shapes(plan: &PrunePlan) -> HashMap<String, Vec<usize>> {
    let hidden = plan.shape.hidden_size;
    let mut shapes = HashMap::new();
    for kept in &plan.kept {
        for expert in kept.experts_kept() {
            shapes.insert(down_name(kept.layer, expert), vec![hidden, kept.experts[expert].len()]);
            shapes.insert(bias_name(kept.layer, expert), vec![hidden]);
        }
        shapes.insert(router_name(kept.layer), vec![kept.experts.len(), hidden]);
    }
    shapes
}
