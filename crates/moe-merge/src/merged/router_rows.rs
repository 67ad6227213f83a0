//! Rows and biases of a router, mixed.

use moe_checkpoint::{Checkpoint, Dtype, LayerRole, RawMatrix, Role, encode};

use crate::router::RouterMix;
use crate::{Error, Result};

/// Roles of a layer that hold something for each expert in its router.
pub(crate) const ROLES: [LayerRole; 4] =
    [LayerRole::Router, LayerRole::RouterBias, LayerRole::CorrectionBias, LayerRole::ExpertScale];

/// A weight or bias of a router, one row per group of `mix` and then those of identity experts, in its dtype; `None`
/// where the family has no such tensor. Rows that are a single old one are copied byte for byte.
///
/// # Errors
/// [`Error::Incompatible`] for mixed rows that the dtype cannot hold; what keeps the tensor from being read.
pub(crate) fn mixed(
    from: &Checkpoint,
    layer: usize,
    role: LayerRole,
    mix: &RouterMix,
) -> Result<Option<(Vec<u8>, Dtype)>> {
    let Ok(info) = from.role(Role::Layer(layer, role)) else { return Ok(None) };
    let dtype = from.plain_dtype(&info.name)?;
    let mut old = Vec::new();
    from.stream_plain(&info.name, 1 << 24, |part| {
        old.extend_from_slice(part);
        Ok(())
    })?;
    let moe = from.config().moe(layer);
    let rows = moe.map_or(1, |moe| moe.router_rows().max(1));
    let size = dtype.bitsize() / 8;
    let row_bytes = old.len() / rows;
    let row = |expert: usize| &old[expert * row_bytes..(expert + 1) * row_bytes];
    let values =
        |expert: usize| RawMatrix { bytes: row(expert).into(), dtype, rows: 1, cols: row_bytes / size }.to_f32();
    let mut out = Vec::with_capacity(mix.rows.len() * row_bytes);
    for (parts, bias) in mix.rows.iter().zip(&mix.bias) {
        let bias = if role == LayerRole::RouterBias { *bias } else { 0.0 };
        if let ([(expert, 1.0)], 0.0) = (&parts[..], bias) {
            out.extend_from_slice(row(*expert));
            continue;
        }
        let mut sum = vec![bias; row_bytes / size];
        for (expert, factor) in parts {
            sum.iter_mut().zip(values(*expert)).for_each(|(sum, v)| *sum += factor * f64::from(v));
        }
        let sum: Vec<f32> = sum.into_iter().map(|v| v as f32).collect();
        if !encode(dtype, &sum, &mut out) || sum.iter().any(|v| !v.is_finite()) {
            let reason = format!("rows of tensor `{}` cannot be mixed as {dtype}", info.name);
            return Err(Error::Incompatible { layer, experts: vec![], reason });
        }
    }
    // Those of identity experts come last, and stay.
    out.extend_from_slice(&old[old.len() - moe.map_or(0, |moe| moe.identities) * row_bytes..]);
    Ok(Some((out, dtype)))
}
