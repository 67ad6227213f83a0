//! Layers that predict further tokens, in configs.

use serde_json::{Value, json};

use crate::Checkpoint;

/// Config keys of the number of those layers.
pub(crate) const KEYS: [&str; 3] = ["num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers"];

impl Checkpoint {
    /// Says in `config`, one of this family, that there are no layers of multi-token prediction: for whoever leaves out
    /// [`Checkpoint::mtp_tensors`].
    pub fn drop_mtp_layers(&self, config: &mut Value) {
        if let Value::Object(map) = self.family().text_config_mut(config) {
            for key in KEYS.into_iter().filter(|key| map.contains_key(*key)).collect::<Vec<_>>() {
                map.insert(key.to_string(), json!(0));
            }
        }
    }
}
