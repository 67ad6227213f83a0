//! `moe score`.

use std::fs;

use moe::expert_ranking::ExpertRanking;
use moe_checkpoint::ScoreTable;
use moe_cli::TINY_MOE;

use crate::support::{ok, refused, rows, text, words};

const SMALL: &str = "--samples 8 --length 48 --wave-tokens 128";

#[test]
fn statistics_are_scored_again_without_running_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let (first, again) = (dir.path().join("first"), dir.path().join("again"));
    let data = rows("arithmetic_calibration");
    let score = ["score", "--model", TINY_MOE];
    let small: Vec<&str> = SMALL.split(' ').collect();
    let scorers = ["--scorer", "fisher", "--scorer", "reap"];
    ok(&[&score[..], &["--data", &data, "--out", text(&first)], &small, &scorers].concat());
    let said = ok(&[&score[..], &["--statistics", text(&first), "--out", text(&again)], &scorers].concat());
    assert!(said.contains("statistics that were there, of 8 sequences"), "{said}");
    for name in ["fisher", "reap"] {
        let table = |dir: &std::path::Path| ScoreTable::load(dir.join(format!("{name}.safetensors"))).unwrap();
        assert_eq!(table(&first), table(&again), "{name}");
    }
    // Another scorer needs what was not collected; another model has other statistics.
    let out = dir.path().join("more");
    let lacking = [&score[..], &["--statistics", text(&first), "--scorer", "heapr", "--out", text(&out)]].concat();
    let (code, error) = refused(&lacking);
    assert!(code == 1 && error.contains("statistic"), "{error}");
    let half = dir.path().join("half");
    let fisher = first.join("fisher.safetensors");
    ok(&words(
        "prune --ratio 0.5 --form uniform",
        &["--model", TINY_MOE, "--scores", text(&fisher), "--out", text(&half)],
    ));
    let of_another =
        ["score", "--model", text(&half), "--statistics", text(&first), "--scorer", "reap", "--out", text(&out)];
    let (_, error) = refused(&of_another);
    assert!(error.contains("fingerprint"), "{error}");
}

#[test]
fn experts_are_ranked_for_engines_that_prune_when_they_load() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("scores");
    let data = rows("arithmetic_calibration");
    let files = ["--model", TINY_MOE, "--calibration", &data, "--out", text(&out)];
    ok(&words(&format!("score --scorer reap --scorer magnitude {SMALL}"), &files));
    let lines = fs::read_to_string(out.join("experts.jsonl")).unwrap();
    let rankings: Vec<ExpertRanking> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let reap = ScoreTable::load(out.join("reap.safetensors")).unwrap();
    assert_eq!(rankings.len(), 2 * reap.layers.len());
    for (ranking, layer) in rankings.iter().filter(|ranking| ranking.scorer == "reap").zip(&reap.layers) {
        assert_eq!(ranking.layer, layer.layer);
        assert!(ranking.scores.windows(2).all(|pair| pair[0] >= pair[1]));
        assert!(ranking.experts.iter().zip(&ranking.scores).all(|(expert, score)| layer.scores[*expert][0] == *score));
    }
}

#[test]
fn files_share_the_samples_by_weight_and_answers_alone_count_where_that_is_asked() {
    let dir = tempfile::tempdir().unwrap();
    let losses = |name: &str, data: &[&str], more: &str| -> (f64, u64, u64) {
        let out = dir.path().join(name);
        let mut line =
            words(&format!("score --scorer fisher --json {SMALL} {more}"), &["--model", TINY_MOE, "--out", text(&out)])
                .into_iter()
                .map(String::from)
                .collect::<Vec<_>>();
        data.iter().for_each(|file| line.extend(["--data".to_string(), file.to_string()]));
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        let report: serde_json::Value = serde_json::from_str(&ok(&line)).unwrap();
        let number = |key: &str| report[key].as_u64().unwrap();
        (report["loss"].as_f64().unwrap(), number("sequences"), number("tokens"))
    };
    let (arithmetic, facts) = (rows("arithmetic_calibration"), rows("facts_calibration"));
    let all = losses("all", &[&arithmetic], "");
    let answers = losses("answers", &[&arithmetic], "--loss answers");
    assert_eq!(all.2, answers.2, "all tokens run");
    assert_ne!(all.0, answers.0);
    let (three, one) = (format!("{arithmetic}=3"), format!("{facts}=1"));
    let mixed = losses("mixed", &[&three, &one], "");
    let even = losses("even", &[&arithmetic, &facts], "");
    assert_eq!((mixed.1, even.1), (8, 8));
    assert_ne!(mixed.0, even.0);
    let out = dir.path().join("bad");
    let (code, error) =
        refused(&["score", "--model", TINY_MOE, "--data", "a.jsonl=0", "--scorer", "fisher", "--out", text(&out)]);
    assert!(code == 2 && error.contains("weight 0"), "{error}");
}

#[test]
fn shards_are_collected_apart_and_scored_together() {
    let dir = tempfile::tempdir().unwrap();
    let out = |name: &str| dir.path().join(name);
    let data = rows("arithmetic_calibration");
    let score = |name: &str, more: &[&str]| {
        let out = out(name);
        let files = [&["--model", TINY_MOE, "--data", &data, "--out", text(&out)][..], more].concat();
        ok(&words(&format!("score --scorer fisher {SMALL}"), &files));
    };
    score("whole", &[]);
    score("one", &["--shard", "0/2"]);
    score("two", &["--shard", "1/2"]);
    assert!(!out("one").join("experts.jsonl").exists());
    score("together", &["--absorb", text(&out("one")), "--absorb", text(&out("two"))]);
    score("whole", &["--resume"]);
    let table = |name: &str| fs::read(out(name).join("fisher.safetensors")).unwrap();
    assert_eq!(table("whole"), table("together"));
}

#[test]
fn a_model_is_calibrated_on_what_it_says_itself() {
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("own.jsonl");
    let (sums, facts) = (rows("arithmetic_calibration"), format!("{}=2", rows("facts_calibration")));
    let flags = ["--model", TINY_MOE, "--rows", &sums, "--rows", &facts, "--for-calibration", text(&own)];
    let line = words("generate --samples 6 --max-new-tokens 5", &flags);
    assert!(ok(&line).contains("rows of"));
    let lines = fs::read_to_string(&own).unwrap();
    assert_eq!(lines.lines().count(), 6, "{lines}");
    for line in lines.lines() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        let of = |name: &str| row[name].as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect::<Vec<_>>();
        let (ids, labels) = (of("input_ids"), of("labels"));
        let answer = labels.iter().position(|label| *label != -100).unwrap();
        assert!(answer > 0 && ids.len() == labels.len() && ids.len() - answer <= 5, "{line}");
        assert_eq!(ids[answer..], labels[answer..]);
    }
    let scores = dir.path().join("scores");
    let flags = ["--model", TINY_MOE, "--data", text(&own), "--out", text(&scores)];
    ok(&words("score --scorer fisher --loss answers", &flags));
    assert!(scores.join("fisher.safetensors").exists());
    assert!(refused(&line).1.contains("exists"));
    assert_eq!(refused(&words("generate --rows x.jsonl", &["--model", TINY_MOE])).0, 2);
}
