//! Opening what fine-tuning saved, whatever it is.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use moe_core::Model;

use crate::{
    AdapterSet, Artifacts, Error, Result,
    compressed_experts::CompressedLayers,
    condenser::Condensers,
    duo::Duo,
    lora::{Lora, Maps},
    mixture::{self, Mixture},
    null_experts::NullExperts,
    peft_files::{self, ReadOptions},
    recurrent_router::RecurrentRouter,
};

/// What a directory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum SavedKind {
    /// A LoRA in PEFT's files.
    Lora,
    /// A mixture of LoRA experts.
    Mixture,
    /// Compressed experts.
    CompressedExperts,
    /// Condenser experts and biases of routing.
    Condensers,
    /// Null experts.
    NullExperts,
    /// A recurrent router.
    RecurrentRouter,
    /// A choice of two numbers of experts.
    Duo,
}

impl SavedKind {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Lora,
        Self::Mixture,
        Self::CompressedExperts,
        Self::Condensers,
        Self::NullExperts,
        Self::RecurrentRouter,
        Self::Duo,
    ];

    /// The kinds that stand beside the weights of a checkpoint, in its directory.
    pub const BESIDE_WEIGHTS: [Self; 5] =
        [Self::CompressedExperts, Self::Condensers, Self::NullExperts, Self::RecurrentRouter, Self::Duo];

    /// The file that it is known by.
    pub fn file(self) -> &'static str {
        match self {
            Self::Lora => peft_files::CONFIG_FILE,
            Self::Mixture => mixture::CONFIG_FILE,
            Self::CompressedExperts => CompressedLayers::FILE,
            Self::Condensers => Condensers::FILE,
            Self::NullExperts => NullExperts::FILE,
            Self::RecurrentRouter => RecurrentRouter::FILE,
            Self::Duo => Duo::FILE,
        }
    }
}

impl fmt::Display for SavedKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lora => "a LoRA",
            Self::Mixture => "a mixture of LoRA experts",
            Self::CompressedExperts => "compressed experts",
            Self::Condensers => "condenser experts",
            Self::NullExperts => "null experts",
            Self::RecurrentRouter => "a recurrent router",
            Self::Duo => "a choice of sizes",
        })
    }
}

/// A directory of what fine-tuning saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedTuning {
    directory: PathBuf,
    kinds: Vec<SavedKind>,
}

/// Looks at what fine-tuning saved in a directory: an adapter, a mixture, or a checkpoint with compressed experts or
/// condensers beside it.
///
/// ```no_run
/// use moe_core::Model;
///
/// let base = Model::open("base", &moe_core::device::device("default")?, None)?;
/// let saved = moe_peft::open("out/adapter")?;
/// println!("{:?}", saved.kinds());
/// let (tuned, _) = saved.onto(&base)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::File`] for a directory with nothing of the kind.
pub fn open(directory: impl AsRef<Path>) -> Result<SavedTuning> {
    let directory = directory.as_ref().to_path_buf();
    let kinds: Vec<SavedKind> =
        SavedKind::ALL.into_iter().filter(|kind| directory.join(kind.file()).exists()).collect();
    if kinds.is_empty() {
        let files: Vec<&str> = SavedKind::ALL.iter().map(|kind| kind.file()).collect();
        let expected = format!("one of {}", files.join(", "));
        return Err(Error::File {
            path: directory,
            what: "contents".into(),
            found: "no file of fine-tuning".into(),
            expected,
        });
    }
    Ok(SavedTuning { directory, kinds })
}

impl SavedTuning {
    /// What there is, in the order of [`SavedKind::ALL`].
    pub fn kinds(&self) -> &[SavedKind] {
        &self.kinds
    }

    /// Whether the directory is a checkpoint itself: what was trained of its weights is folded in, and the rest stands
    /// beside it.
    pub fn is_checkpoint(&self) -> bool {
        self.directory.join("config.json").exists()
    }

    /// `base` as it was at the end of training, and what was put into it. For a [checkpoint](Self::is_checkpoint),
    /// `base` is the model opened from the directory.
    ///
    /// # Errors
    /// What keeps a file from being read, or from fitting the model.
    pub fn onto(&self, base: &Model) -> Result<(Model, Artifacts)> {
        let (mut set, mut artifacts, mut model) = (AdapterSet::new(), Artifacts::default(), None);
        let (maps, device) = (Maps::new(base.checkpoint()), base.device());
        for kind in &self.kinds {
            match kind {
                SavedKind::Lora => {
                    let weights = peft_files::read(&self.directory, &maps, ReadOptions::default())?;
                    artifacts.lora = Some(Arc::new(Lora::install(&mut set, &maps, &[("default", weights)], device)?));
                }
                SavedKind::Mixture => {
                    let mixture = Mixture::load(&self.directory, &mut set, &maps, device)?;
                    artifacts.mixture = Some(Arc::new(mixture));
                }
                SavedKind::CompressedExperts => {
                    let path = self.directory.join(CompressedLayers::FILE);
                    artifacts.compressed = Some(CompressedLayers::load(path, base, &mut set)?);
                }
                SavedKind::Condensers => {
                    let condensers = Condensers::load(self.directory.join(Condensers::FILE), base.config())?;
                    model = Some(condensers.applied_to(base)?);
                    artifacts.condensers = Some(Arc::new(condensers));
                }
                SavedKind::NullExperts => {
                    let nulls = NullExperts::load(self.directory.join(NullExperts::FILE), base)?;
                    model = Some(nulls.applied_to(model.as_ref().unwrap_or(base))?);
                    artifacts.null_experts = Some(Arc::new(nulls));
                }
                SavedKind::RecurrentRouter => {
                    let router = RecurrentRouter::load(self.directory.join(RecurrentRouter::FILE), base)?;
                    model = Some(router.applied_to(model.as_ref().unwrap_or(base))?);
                    artifacts.recurrent_router = Some(Arc::new(router));
                }
                SavedKind::Duo => {
                    let duo = Duo::load(self.directory.join(Duo::FILE), base)?;
                    model = Some(duo.applied_to(model.as_ref().unwrap_or(base))?);
                    artifacts.duo = Some(Arc::new(duo));
                }
            }
        }
        let model = model.as_ref().unwrap_or(base).with_adapters(Arc::new(set))?;
        Ok((model, artifacts))
    }
}
