//! `report.html`: the curves and facts of a run in one file that needs nothing else.

use std::path::Path;

use minijinja::value::Serde;
use minijinja::{Environment, context};
use serde::Serialize;
use serde_json::Value;

use super::{Outcome, disk, metrics};
use crate::{Error, Fault, Result};

/// The report's file.
pub const FILE: &str = "report.html";

/// More points than this are thinned: no screen shows them apart.
const MOST_POINTS: usize = 1200;
/// The drawing's size and margins, in units of its own.
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 30.0;

#[derive(Serialize)]
struct Chart {
    title: String,
    series: Vec<Series>,
    x_ticks: Vec<Tick>,
    y_ticks: Vec<Tick>,
}

#[derive(Serialize)]
struct Series {
    name: &'static str,
    line: String,
    /// x, y, step and value of each point, for the one under the mouse.
    points: Vec<(f64, f64, f64, f64)>,
}

#[derive(Serialize)]
struct Tick {
    at: f64,
    label: String,
}

/// How a chart's values are laid out from bottom to top.
#[derive(Clone, Copy, PartialEq)]
enum Scale {
    Linear,
    /// For values that fall fast and then slowly. Linear all the same where a value is not positive.
    Logarithmic,
}

/// Writes the report of the run in `folder` from its `metrics.jsonl`; `facts` are rows of its table, `recipe` (keys and values,
/// defaults filled in) is shown whole.
pub fn write(folder: &Path, facts: &[(String, String)], recipe: &Value, outcome: &Outcome) -> Result<()> {
    let path = folder.join(metrics::FILE);
    let lines = std::fs::read_to_string(&path).map_err(|error| disk::failed("read", &path, &error))?;
    let html = render(&lines, facts, recipe, outcome);
    let html =
        html.map_err(|error| Error::Output(Fault::at(&folder.join(FILE), format!("cannot make it: {error:#}"))))?;
    disk::replace_file(&folder.join(FILE), html.as_bytes())
}

/// The loss of the run in `folder` as a drawing of its own (SVG), the same as the report's; `None` where nothing was logged.
///
/// # Errors
/// [`Error::Output`] where `metrics.jsonl` cannot be read.
pub fn curves(folder: &Path) -> Result<Option<String>> {
    let path = folder.join(metrics::FILE);
    let lines = std::fs::read_to_string(&path).map_err(|error| disk::failed("read", &path, &error))?;
    let records = records(&lines);
    let series = vec![("training", column(&records, "loss")), ("evaluation", column(&records, "eval_loss"))];
    let Some(chart) = chart("Loss", Scale::Logarithmic, series) else { return Ok(None) };
    let drawn = || -> Result<String, minijinja::Error> {
        // The name ends in .xml, so minijinja escapes every value.
        let mut environment = Environment::new();
        environment.add_template("curves.xml", include_str!("curves.xml"))?;
        environment.get_template("curves.xml")?.render(context! {
            chart => Serde(chart), width => WIDTH, height => HEIGHT, left => LEFT, right => WIDTH - RIGHT,
        })
    };
    drawn().map(Some).map_err(|error| Error::Output(Fault::at(&path, format!("cannot be drawn: {error:#}"))))
}

fn records(lines: &str) -> Vec<Value> {
    lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Steps and values of a key, where it has one.
fn column(records: &[Value], key: &str) -> Vec<(f64, f64)> {
    records.iter().filter_map(|record| Some((record["step"].as_f64()?, record.get(key)?.as_f64()?))).collect()
}

fn render(
    lines: &str,
    facts: &[(String, String)],
    recipe: &Value,
    outcome: &Outcome,
) -> Result<String, minijinja::Error> {
    let records = records(lines);
    let column = |key: &str| column(&records, key);
    let charts: Vec<Chart> = [
        ("Loss", Scale::Logarithmic, vec![("training", column("loss")), ("evaluation", column("eval_loss"))]),
        ("Balance of experts", Scale::Linear, vec![("router_aux_loss", column("router_aux_loss"))]),
        ("Learning rate", Scale::Linear, vec![("learning rate", column("learning_rate"))]),
        ("Gradient norm before clipping", Scale::Linear, vec![("gradient norm", column("grad_norm"))]),
        ("Trained tokens per second", Scale::Linear, vec![("tokens/s", column("trained_tokens_per_second"))]),
    ]
    .into_iter()
    .filter_map(|(title, scale, series)| chart(title, scale, series))
    .collect();

    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.4}"));
    let peak = column("peak_memory_bytes").last().map(|(_, bytes)| format!("{:.2} GiB", bytes / (1u64 << 30) as f64));
    let mut table = vec![
        ("Steps".to_owned(), outcome.steps.to_string()),
        ("Loss".to_owned(), number(outcome.loss)),
        ("Eval loss".to_owned(), number(outcome.eval_loss)),
    ];
    if let Some(best) = outcome.best {
        table.push(("Best eval loss".to_owned(), format!("{:.4} at step {}", best.eval_loss, best.step)));
    }
    table.push(("Adapter taken from".to_owned(), format!("step {}", outcome.taken)));
    table.push(("Tokens".to_owned(), format!("{} of which {} trained", outcome.tokens, outcome.trained_tokens)));
    table.push(("Time".to_owned(), format!("{:.0} s", outcome.seconds)));
    if let Some(energy) = &outcome.energy {
        let of = energy.of.join(", ");
        table.push(("Energy".to_owned(), format!("{:.4} kWh of the whole machine ({of})", energy.joules / 3.6e6)));
    }
    table.extend(peak.map(|peak| ("Peak memory".to_owned(), peak)));
    if outcome.stopped_early {
        table.push(("Stopped early".to_owned(), "yes".to_owned()));
    }
    if outcome.skipped_steps > 0 {
        table.push(("Steps skipped as not finite".to_owned(), outcome.skipped_steps.to_string()));
    }
    table.extend(facts.iter().cloned());

    let typed = recipe.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    let recipe: Vec<(&String, String)> =
        typed.map(|(key, value)| (key, value.as_str().map_or_else(|| value.to_string(), str::to_owned))).collect();

    // The name ends in .html, so minijinja escapes every value.
    let mut environment = Environment::new();
    environment.add_template("report.html", include_str!("report.html"))?;
    environment.get_template("report.html")?.render(context! {
        summary => outcome.to_string(),
        charts => Serde(charts), table => Serde(table), recipe => Serde(recipe),
        width => WIDTH, height => HEIGHT, left => LEFT, right => WIDTH - RIGHT, top => TOP, bottom => HEIGHT - BOTTOM,
    })
}

/// A chart of the series that have points; `None` when none has.
fn chart(title: &str, scale: Scale, series: Vec<(&'static str, Vec<(f64, f64)>)>) -> Option<Chart> {
    let series: Vec<_> = series.into_iter().filter(|(_, points)| !points.is_empty()).collect();
    let all = || series.iter().flat_map(|(_, points)| points.iter().copied());
    let range = |pick: fn((f64, f64)) -> f64| {
        let (low, high) = all().map(pick).fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        // One value alone gets some room around it.
        if high > low { (low, high) } else { (low - (low.abs() * 0.1).max(1e-9), low + (low.abs() * 0.1).max(1e-9)) }
    };
    if series.is_empty() {
        return None;
    }
    let (x_range, y_range) = (range(|(x, _)| x), range(|(_, y)| y));
    let logarithmic = scale == Scale::Logarithmic && y_range.0 > 0.0;
    let laid_out = |y: f64| if logarithmic { y.ln() } else { y };
    let (bottom, top) = (laid_out(y_range.0), laid_out(y_range.1));
    let x_at = |x: f64| round(LEFT + (x - x_range.0) / (x_range.1 - x_range.0) * (WIDTH - LEFT - RIGHT));
    let y_at = |y: f64| round(HEIGHT - BOTTOM - (laid_out(y) - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM));
    let tick = |value: f64, at: f64| Tick { at, label: label(value) };
    let y_ticks = if logarithmic { logarithmic_ticks(y_range) } else { ticks(y_range, 5) };
    Some(Chart {
        title: if logarithmic { format!("{title} (logarithmic)") } else { title.to_owned() },
        x_ticks: ticks(x_range, 8).into_iter().filter(|x| x.fract() == 0.0).map(|x| tick(x, x_at(x))).collect(),
        y_ticks: y_ticks.into_iter().map(|y| tick(y, y_at(y))).collect(),
        series: series
            .into_iter()
            .map(|(name, points)| {
                let points: Vec<_> = thin(&points).into_iter().map(|(x, y)| (x_at(x), y_at(y), x, y)).collect();
                let line: Vec<String> = points.iter().map(|(x, y, _, _)| format!("{x},{y}")).collect();
                Series { name, line: line.join(" "), points }
            })
            .collect(),
    })
}

/// At most about [`MOST_POINTS`], the lowest and the highest of each stretch, so that no spike is lost.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MOST_POINTS {
        return points.to_vec();
    }
    let stretch = points.len().div_ceil(MOST_POINTS / 2);
    let extremes = points.chunks(stretch).flat_map(|chunk| {
        let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let ends = chunk.iter().min_by(by_value).zip(chunk.iter().max_by(by_value));
        let mut ends: Vec<(f64, f64)> = ends.map(|(low, high)| vec![*low, *high]).unwrap_or_default();
        ends.sort_by(|a, b| a.0.total_cmp(&b.0));
        ends.dedup();
        ends
    });
    extremes.collect()
}

/// Round numbers (1, 2 or 5 times a power of ten apart) within a range, about `count` of them.
fn ticks((low, high): (f64, f64), count: usize) -> Vec<f64> {
    let rough = (high - low) / count as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|step| *step >= rough).unwrap_or(rough);
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

/// 1, 2 and 5 times powers of ten within a range of positive values (powers of ten alone where that is many); evenly spaced
/// ones where the range is too narrow for these.
fn logarithmic_ticks((low, high): (f64, f64)) -> Vec<f64> {
    let powers = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let factors: &[f64] = if powers.clone().count() > 4 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let all = powers.flat_map(|power| factors.iter().map(move |factor| factor * 10f64.powi(power)));
    let within: Vec<f64> = all.filter(|value| (low..=high).contains(value)).collect();
    if within.len() < 3 { ticks((low, high), 5) } else { within }
}

fn label(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if !(1e-3..1e6).contains(&size) => format!("{value:.1e}"),
        _ => {
            let text = format!("{value:.4}");
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        }
    }
}

fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::Best;

    fn outcome() -> Outcome {
        Outcome {
            steps: 30,
            skipped_steps: 0,
            loss: Some(1.25),
            eval_loss: Some(1.5),
            best: Some(Best { step: 20, eval_loss: 1.4 }),
            taken: 20,
            tokens: 1000,
            trained_tokens: 300,
            seconds: 12.0,
            began: None,
            energy: Some(crate::train::Energy { joules: 7200.0, of: vec!["package-0".into()] }),
            stopped_early: true,
            state: "state/step-000030".into(),
        }
    }

    #[test]
    fn the_report_shows_curves_and_facts_and_needs_nothing_else() {
        let mut lines: String = (1..=30)
            .map(|step| {
                let loss = if step == 7 { "null".into() } else { format!("{}", 3.0 / f64::from(step)) };
                format!("{{\"step\":{step},\"loss\":{loss},\"learning_rate\":1e-4,\"grad_norm\":0.5,\"trained_tokens_per_second\":10,\"peak_memory_bytes\":1073741824}}\n")
            })
            .collect();
        lines += "{\"step\":20,\"eval_loss\":1.4}\n{\"step\":30,\"eval_loss\":1.5}\n{\"step\":31,\"lo";
        let facts = [("Base".to_owned(), "<script>alert('{{ x }}')</script>".to_owned())];
        let recipe = serde_json::json!({"dtype": "bf16", "adapter.r": 16, "training.max_steps": null, "name": "<b>"});
        let html = render(&lines, &facts, &recipe, &outcome()).unwrap();
        assert!(html.contains("<td>adapter.r</td><td>16</td>") && html.contains("<td>bf16</td>"));
        assert!(!html.contains("training.max_steps") && !html.contains("<b>"), "what is not set is not shown");
        assert!(html.contains("Loss (logarithmic)"));
        assert_eq!(html.matches("<polyline").count(), 5, "training and evaluation loss and three more curves");
        assert!(html.contains("0.0020 kWh of the whole machine (package-0)"));
        assert!(html.contains("1.00 GiB") && html.contains("1.4000 at step 20"));
        assert!(!html.contains("<script>alert"), "facts are escaped");
        for outside in ["http:", "https:", "src=", "href=", "@import", "url("] {
            assert!(!html.contains(outside), "{outside}");
        }
    }

    #[test]
    fn the_curve_alone_is_a_drawing_that_needs_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let lines: String =
            (1..=5).map(|step| format!("{{\"step\":{step},\"loss\":{}}}\n", 3.0 / f64::from(step))).collect();
        std::fs::write(folder.path().join(metrics::FILE), lines + "{\"step\":5,\"eval_loss\":1.5}\n").unwrap();
        let drawing = curves(folder.path()).unwrap().unwrap();
        assert!(drawing.starts_with("<svg xmlns=") && drawing.matches("<polyline").count() == 2, "{drawing}");
        assert!(!drawing.contains("<script") && !drawing.contains("href"));
        std::fs::write(folder.path().join(metrics::FILE), "").unwrap();
        assert_eq!(curves(folder.path()).unwrap(), None);
    }

    #[test]
    fn a_run_that_logged_nothing_still_has_a_report() {
        let html = render("", &[], &Value::Null, &outcome()).unwrap();
        assert!(!html.contains("<polyline"));
    }

    #[test]
    fn ticks_are_round_and_within() {
        assert_eq!(ticks((0.0, 10.0), 5), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks((1.0, 30.0), 8), [5.0, 10.0, 15.0, 20.0, 25.0, 30.0]);
        assert_eq!([label(0.0), label(2.5), label(1e-4), label(2e7)], ["0", "2.5", "1.0e-4", "2.0e7"]);
    }

    #[test]
    fn a_loss_that_falls_fast_is_not_flat_for_the_rest() {
        let heights = |scale| {
            let points = vec![(1.0, 8.0), (2.0, 0.4), (3.0, 0.1)];
            let chart = chart("Loss", scale, vec![("training", points)]).unwrap();
            chart.series[0].points.iter().map(|point| point.1).collect::<Vec<f64>>()
        };
        let rise = |heights: &[f64]| (heights[2] - heights[1]) / (heights[2] - heights[0]);
        assert!(rise(&heights(Scale::Linear)) < 0.05);
        let logarithmic = heights(Scale::Logarithmic);
        assert!(rise(&logarithmic) > 0.3 && logarithmic[0] == TOP && logarithmic[2] == HEIGHT - BOTTOM);
        let zero = chart("Loss", Scale::Logarithmic, vec![("training", vec![(1.0, 0.0), (2.0, 1.0)])]).unwrap();
        assert_eq!((zero.title.as_str(), zero.series[0].points[0].1), ("Loss", HEIGHT - BOTTOM));
        assert_eq!(logarithmic_ticks((0.1, 8.0)), [0.1, 0.2, 0.5, 1.0, 2.0, 5.0]);
        assert_eq!(logarithmic_ticks((1.1, 1.4)), ticks((1.1, 1.4), 5));
        assert_eq!(logarithmic_ticks((0.003, 400.0)), [0.01, 0.1, 1.0, 10.0, 100.0]);
    }

    #[test]
    fn thinning_keeps_spikes() {
        let mut points: Vec<(f64, f64)> = (0..50_000).map(|i| (f64::from(i), 1.0)).collect();
        points[31_234].1 = 99.0;
        let thinned = thin(&points);
        assert!(thinned.len() <= MOST_POINTS && thinned.contains(&(31_234.0, 99.0)));
        assert!(thinned.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }
}
