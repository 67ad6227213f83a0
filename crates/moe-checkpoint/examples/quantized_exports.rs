//! Quantizes a model: `cargo run --release -p moe-checkpoint --example quantized_exports -- MODEL FORMAT OUT [linear]`.

use std::sync::Arc;

use moe_checkpoint::{
    Checkpoint, Existing, QuantizeOptions, Quantized, QuantizedPart, WeightFormat, WriteOptions, write,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let ([model, format, out] | [model, format, out, _]) = &arguments[..] else {
        return Err("usage: quantize MODEL FORMAT OUT [linear]".into());
    };
    let part = if arguments.len() == 4 { QuantizedPart::Linear } else { QuantizedPart::Experts };
    let base = Arc::new(Checkpoint::open(model)?);
    let quantized = Quantized::on(&base, &QuantizeOptions { format: format.parse::<WeightFormat>()?, part })?;
    write(quantized.model(), out, &WriteOptions { existing: Existing::Force, ..WriteOptions::default() })?;
    print!("{}", quantized.report());
    Ok(())
}
