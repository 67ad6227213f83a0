//! Methods as JSON.

use moe_checkpoint::{Pool, Reduction};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::Needs;

/// A method with its parameters, under the name that recipes know it by.
pub(crate) fn tagged(name: &str, method: &impl Serialize) -> Value {
    // Only a path that is not Unicode has no JSON; a recipe that says so still identifies the method.
    let value = serde_json::to_value(method).unwrap_or_else(|error| json!({ "unwritable": error.to_string() }));
    let mut fields = Map::from_iter([("type".to_string(), name.into())]);
    if let Value::Object(parameters) = value {
        fields.extend(parameters);
    }
    Value::Object(fields)
}

/// The same needs, with what a reduction of unit scores to expert scores adds.
pub(crate) fn reducing(needs: Needs, reduction: Reduction) -> Needs {
    match reduction {
        Reduction::Sum => needs.adding(Pool::Expert, "the sum over the units of an expert"),
        _ => needs,
    }
}
