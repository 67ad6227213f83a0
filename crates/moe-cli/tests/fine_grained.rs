//! The `fine_grained` program, end to end.

use clap::Parser;
use moe_checkpoint::Checkpoint;
use moe_cli::fine_grained::{Arguments, Factors, run};
use moe_prune::{Applied, Export};

fn arguments(more: &[&str], out: &std::path::Path) -> Arguments {
    let out = out.display().to_string();
    let given = ["fine_grained", "--samples", "12", "--eval-rows", "2", "--length", "64", "--out", &out];
    Arguments::try_parse_from(given.iter().chain(more)).unwrap()
}

#[test]
fn the_export_closest_to_the_model_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let more = ["--pieces", "2,4", "--per-token", "0.5,1", "--factors", "0.1,whole", "--controls"];
    let report = run(&arguments(&more, &out)).unwrap();
    // Two plain exports, then two numbers of pieces, two factors and two numbers per token.
    assert_eq!(report.rows.len(), 2 + 8);
    let divergence = |row: usize| report.rows[row].divergence.unwrap_or(f64::INFINITY);
    assert!((0..report.rows.len()).all(|row| divergence(report.best) <= divergence(row)));
    let best = &report.rows[report.best];
    // A tenth of what experts gave is far from the model.
    assert_eq!((best.export, best.factors), (Export::FineGrained, Some(Factors::Whole)));
    assert!(report.rows.iter().all(|row| row.metrics.len() == 2));
    let written = Checkpoint::open(&out).unwrap();
    let pieces = best.pieces.unwrap();
    assert_eq!(written.shape().uniform_width(), Some(96 / pieces));
    assert_eq!(written.config().routing.top_k, best.top_k.unwrap());
    assert!(written.shape().layers.iter().all(|layer| layer.num_experts() == 16 * pieces / 2));
    assert_eq!(Applied::load(&out).unwrap().export, Export::FineGrained);
    // Nothing is left beside it.
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    let text = report.to_string();
    assert!(text.contains("whole") && text.contains("arithmetic_exact"), "{text}");

    let again = run(&arguments(&more, &out)).unwrap_err().to_string();
    assert!(again.contains("exists"), "{again}");
    let other = directory.path().join("other");
    let bad = run(&arguments(&["--per-token", "0"], &other)).unwrap_err().to_string();
    assert!(bad.contains("--per-token"), "{bad}");
    let bad = run(&arguments(&["--pieces", "5"], &other)).unwrap_err().to_string();
    assert!(bad.contains("5 equal pieces"), "{bad}");
}
