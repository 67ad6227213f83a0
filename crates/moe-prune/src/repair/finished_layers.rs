//! Layers that a refit has done, kept so that a run that was stopped does not do them again, and so that several
//! processes can share the layers out.

use std::fs;
use std::path::{Path, PathBuf};

use moe_core::data::Wave;
use moe_importance::calibration::waves_hash;
use serde_json::{Value, json};

use crate::{Edits, Error, PrunePlan, Result};

/// What the names of files end with.
const SUFFIX: &str = "safetensors";

/// A file of edits per finished layer, in a directory named by all that they follow from. Nothing is kept without a
/// store.
pub(super) struct FinishedLayers {
    dir: Option<PathBuf>,
    plan: PrunePlan,
}

impl FinishedLayers {
    /// Of a refit with this recipe, whose edits fit `plan`, on these waves. `models` are the fingerprints of the models
    /// that run.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(
        store: Option<&Path>,
        recipe: &Value,
        plan: &PrunePlan,
        models: &[String],
        waves: &[Wave],
    ) -> Result<Self> {
        let of = json!({ "recipe": recipe, "plan": plan.digest(), "models": models, "data": waves_hash(waves) });
        let digest = blake3::hash(of.to_string().as_bytes()).to_hex();
        let dir = store.map(|store| store.join(format!("layers-{}", &digest[..16])));
        if let Some(dir) = &dir {
            fs::create_dir_all(dir).map_err(|source| Error::Io { path: dir.clone(), source })?;
        }
        Ok(Self { dir, plan: plan.clone() })
    }

    /// Takes over the layers that another run of the same job has done, from its store.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] if this run keeps nothing, or the other store has nothing of this job; files that
    /// are not what [`save`](Self::save) wrote.
    pub fn absorb(&self, store: &Path) -> Result<()> {
        let refused = |found: String, expected: &str| Error::InvalidParameter {
            field: "absorb",
            found,
            expected: expected.into(),
        };
        let Some(name) = self.dir.as_deref().and_then(Path::file_name) else {
            return Err(refused(store.display().to_string(), "none: there is no store to take it into"));
        };
        let dir = store.join(name);
        let files = match fs::read_dir(&dir) {
            Ok(files) => files.collect::<std::io::Result<Vec<_>>>(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let expected = "a store of this repair, plan, models and data";
                return Err(refused(format!("{}, without {}", store.display(), name.display()), expected));
            }
            Err(error) => Err(error),
        };
        for file in files.map_err(|source| Error::Io { path: dir.clone(), source })? {
            let own = self.dir.as_ref().map(|own| own.join(file.file_name()));
            if let Some(own) = own.filter(|own| own.extension().is_some_and(|e| e == SUFFIX) && !own.exists()) {
                Edits::load(file.path(), &self.plan)?.save(own, &self.plan)?;
            }
        }
        Ok(())
    }

    /// The edits of a layer, if it is done; their recipe says more of it.
    ///
    /// # Errors
    /// A file that is not what [`save`](Self::save) wrote.
    pub fn load(&self, layer: usize) -> Result<Option<Edits>> {
        match self.path(layer).filter(|path| path.exists()) {
            Some(path) => Ok(Some(Edits::load(path, &self.plan)?)),
            None => Ok(None),
        }
    }

    /// Keeps the edits of a layer.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, layer: usize, edits: &Edits) -> Result<()> {
        match self.path(layer) {
            Some(path) => edits.save(path, &self.plan),
            None => Ok(()),
        }
    }

    fn path(&self, layer: usize) -> Option<PathBuf> {
        self.dir.as_ref().map(|dir| dir.join(format!("layer-{layer:04}.{SUFFIX}")))
    }
}
