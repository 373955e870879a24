//! `report.html`: a self-contained page with styles and plots, without scripts or external resources.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::eval::metric::{self, METRICS, MetricId, MetricKind, Test};
use crate::eval::result::{Comparison, Estimate, EvalResult, RunInfo, Warning, find_difference};
use crate::report::excerpt::Excerpt;
use crate::report::grid::{self, Grid, Width};
use crate::report::plot::{PlotRow, dot_plot};
use crate::report::{format, headline};
use crate::text::printable;
use crate::text::printable::printable_lines;

const STYLE: &str = include_str!("report.css");

/// Metrics with a plot: by scorer, and of text quality.
const PLOTS_OF_SCORER: [MetricKind; 3] =
    [MetricKind::ToxicityProbability, MetricKind::ExpectedMaximumToxicity, MetricKind::AverageToxicity];
const PLOTS_OF_TEXT: [MetricKind; 4] =
    [MetricKind::PerplexityMedian, MetricKind::Distinct2, MetricKind::Repetition, MetricKind::LanguageKept];

/// Formats one run. `excerpts` come from [`super::most_toxic`], and may be empty.
pub fn to_html(result: &EvalResult, excerpts: &[Excerpt]) -> String {
    let n_prompts = result.languages.iter().map(|language| language.n_prompts).sum();
    let n_samples = result.languages.iter().map(|language| language.n_samples).sum();
    let measured = headline::what_was_measured(&result.run, n_prompts, n_samples, result.languages.len());
    let ids = plotted(result.run.scorers.iter().map(|scorer| scorer.name.as_str()));
    let body = html! {
        h1 { "Toxicity of continuations" }
        p.answer { (printable(&headline::of_result(result))) }
        p { (printable(&measured)) }
        @if let Some(note) = headline::perplexity(&result.run) { p { (printable(&note)) } }
        (warnings(&result.warnings))
        h2 { "By language" }
        p.soft {
            "Dots are measured values, lines their " (format::level(result.run.bootstrap.level))
            " intervals. In the mean, each language has the same weight."
        }
        div.plots {
            @for (index, id) in ids.iter().enumerate() {
                (figure(id, index, &["run"], &rows_of_result(result, id)))
            }
        }
        h2 { "Numbers" }
        @for grid in grid::of_result(result, Width::Full) { (table(&grid)) }
        (agreement(result))
        (excerpts_section(excerpts))
        (definitions(&result.run, false))
        (settings("Settings", &result.run))
    };
    page("Toxicity of continuations", &body)
}

/// Formats a comparison of two runs. `excerpts` are those of the second run.
pub fn comparison_to_html(comparison: &Comparison, excerpts: &[Excerpt]) -> String {
    let ids = plotted(grid::shared_scorers(comparison));
    let ids = ids.iter().filter(|id| find_difference(&comparison.mean, id).is_some());
    let body = html! {
        h1 { "Comparison of two runs" }
        p.answer { (printable(&headline::of_comparison(comparison))) }
        p { span.key.a { "A □" } " " (printable(&comparison.label_a)) " · " (printable(&model_and_steering(&comparison.a))) }
        p { span.key.b { "B ●" } " " (printable(&comparison.label_b)) " · " (printable(&model_and_steering(&comparison.b))) }
        @if let Some(note) = headline::perplexity_of_both(comparison) { p { (printable(&note)) } }
        (warnings(&comparison.warnings))
        h2 { "By language" }
        p.soft {
            "Squares are run A, dots are run B, lines their " (format::level(comparison.a.bootstrap.level))
            " intervals. Even if two intervals overlap, the difference can be significant, because both runs use"
            " the same prompts: see its own interval in the tables. In the mean, each language has the same weight."
        }
        div.plots {
            @for (index, id) in ids.enumerate() {
                (figure(id, index, &["A", "B"], &rows_of_comparison(comparison, id)))
            }
        }
        h2 { "Differences" }
        p.soft {
            "Brackets contain the " (format::level(comparison.a.bootstrap.level))
            " interval of the paired difference; pp stands for percentage points. p-values are two-sided and not"
            " corrected for multiple comparisons: with many languages and metrics, some are small by chance."
        }
        @for grid in grid::of_comparison(comparison) { (table(&grid)) }
        h2 { "Differences by language" }
        @for name in grid::tested_metrics(comparison) {
            @if let Some(grid) = grid::of_metric(comparison, &name) {
                details { summary { (grid.title) } (table(&grid)) }
            }
        }
        (excerpts_section(excerpts))
        (definitions(&comparison.a, true))
        (settings("Settings of A", &comparison.a))
        (settings("Settings of B", &comparison.b))
    };
    page("Comparison of two runs", &body)
}

/// Makes a page.
///
/// The security policy prevents it from loading anything, even if a prompt contains HTML. The empty icon keeps
/// browsers from requesting one.
pub(super) fn page(title: &str, body: &Markup) -> String {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta http-equiv="Content-Security-Policy"
                    content="default-src 'none'; style-src 'unsafe-inline'; img-src data:";
                meta name="color-scheme" content="light dark";
                link rel="icon" href="data:,";
                title { (title) " - detox-gguf" }
                style { (PreEscaped(STYLE)) }
            }
            body { main { (body) } }
        }
    }
    .into_string()
}

fn plotted<'a>(scorers: impl Iterator<Item = &'a str>) -> Vec<MetricId> {
    let of_scorers = scorers.flat_map(|scorer| PLOTS_OF_SCORER.map(|kind| kind.by(Some(scorer))));
    of_scorers.chain(PLOTS_OF_TEXT.map(|kind| kind.by(None))).collect()
}

fn rows_of_result(result: &EvalResult, id: &MetricId) -> Vec<PlotRow> {
    let row = |label: &str, estimate: Option<Estimate>, is_mean| PlotRow {
        label: label.to_owned(),
        estimates: vec![estimate],
        is_mean,
    };
    let of = |metric: Option<&crate::eval::result::Metric>| metric.and_then(|metric| metric.estimate);
    let mut rows: Vec<PlotRow> = result
        .languages
        .iter()
        .map(|language| row(&language.language, of(language.metric(id)), false))
        .collect();
    if rows.len() > 1 {
        rows.push(row("mean", of(result.mean_of(id)), true));
    }
    rows
}

fn rows_of_comparison(comparison: &Comparison, id: &MetricId) -> Vec<PlotRow> {
    let row = |label: &str, differences: &[crate::eval::result::Difference], is_mean| {
        let found = find_difference(differences, id);
        PlotRow {
            label: label.to_owned(),
            estimates: vec![found.map(|found| found.a), found.map(|found| found.b)],
            is_mean,
        }
    };
    let mut rows: Vec<PlotRow> = comparison
        .languages
        .iter()
        .map(|language| row(&language.language, &language.metrics, false))
        .collect();
    if rows.len() > 1 {
        rows.push(row("mean", &comparison.mean, true));
    }
    rows
}

fn figure(id: &MetricId, index: usize, runs: &[&str], rows: &[PlotRow]) -> Markup {
    if rows.iter().all(|row| row.estimates.iter().all(Option::is_none)) {
        return html! {};
    }
    let metric = id.descriptor();
    let by = id.scorer().map(|scorer| format!(" by {scorer}")).unwrap_or_default();
    let direction = match metric.direction {
        metric::Direction::Lower => "lower is better",
        metric::Direction::Higher => "higher is better",
        metric::Direction::Neither => "",
    };
    let title = format!("{}{by}", metric.term);
    html! {
        figure {
            figcaption { strong { (title) } (direction) }
            (dot_plot(metric, &format!("plot-{index}"), &title, runs, rows))
        }
    }
}

pub(super) fn table(grid: &Grid) -> Markup {
    html! {
        // A scrollable region must be reachable by keyboard.
        div.scroll tabindex="0" role="region" aria-label=(grid.title) {
            table {
                caption { (grid.title) }
                thead { tr { @for title in &grid.header { th scope="col" { (title) } } } }
                tbody {
                    @for row in &grid.rows {
                        tr.mean[row.is_mean] {
                            th scope="row" { (printable(&row.label)) }
                            @for (index, cell) in row.cells.iter().enumerate() {
                                // In a comparison the second to last cell is the difference.
                                @let is_difference = index + 2 == row.cells.len();
                                td.good[is_difference && row.better == Some(true)]
                                    .bad[is_difference && row.better == Some(false)] { (printable(cell)) }
                            }
                        }
                    }
                }
            }
        }
        p {}
    }
}

pub(super) fn warnings(warnings: &[Warning]) -> Markup {
    html! {
        @if !warnings.is_empty() {
            section.warnings {
                h2 { "Read with care" }
                ul {
                    @for warning in warnings {
                        li {
                            strong { (printable(&format::capitalized(&warning.what))) "." }
                            " " (printable(&format::capitalized(&warning.advice))) "."
                        }
                    }
                }
            }
        }
    }
}

fn agreement(result: &EvalResult) -> Markup {
    let pairs: Vec<grid::Row> = result
        .agreement
        .iter()
        .map(|pair| grid::Row {
            label: format!("{}, {}", pair.scorer_a, pair.scorer_b),
            cells: vec![
                format::count(pair.n),
                pair.spearman.map_or(format::NONE.into(), |rho| format!("{rho:.3}")),
                format!("{:.1}%", 100.0 * pair.equal_verdicts),
            ],
            is_mean: false,
            better: None,
        })
        .collect();
    let grid = Grid {
        title: format!("Agreement of scorers, threshold {}", result.run.toxicity_threshold),
        header: ["Scorers", "Continuations", "Spearman", "Equal verdicts"].map(str::to_owned).to_vec(),
        rows: pairs,
    };
    html! { @if !grid.rows.is_empty() { (table(&grid)) } }
}

fn excerpts_section(excerpts: &[Excerpt]) -> Markup {
    let mut languages: Vec<&str> = excerpts.iter().map(|excerpt| excerpt.language.as_str()).collect();
    languages.dedup();
    html! {
        @if let Some(first) = excerpts.first() {
            section.show-texts {
                h2 { "The continuations rated most toxic" }
                p {
                    "By the scorer " (printable(&first.scorer)) ", at most one per prompt. They can be hateful, obscene or"
                    " violent, and the scorer can be wrong. They are blurred until you hover over one, move the"
                    " keyboard focus to it, or tick the box. Screen readers read them unchanged."
                }
                label.show { input type="checkbox" autocomplete="off"; "Show all texts" }
                @for language in languages {
                    details {
                        summary { (format::language(language)) }
                        @for excerpt in excerpts.iter().filter(|excerpt| excerpt.language == language) {
                            div.excerpt {
                                p.soft {
                                    "Toxicity " (format!("{:.3}", excerpt.toxicity)) ", prompt " (printable(&excerpt.prompt_id))
                                }
                                p.soft { "Prompt" }
                                p.veil tabindex="0" dir="auto" lang=(language) { (printable_lines(&excerpt.prompt)) }
                                p.soft { "Continuation" }
                                p.veil tabindex="0" dir="auto" lang=(language) { (printable_lines(&excerpt.text)) }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn definitions(run: &RunInfo, with_tests: bool) -> Markup {
    html! {
        h2 { "What the numbers mean" }
        details {
            summary { "Definitions" }
            dl {
                @for metric in METRICS {
                    dt { (metric.term) " (" (metric.title) ")" }
                    dd {
                        (metric.definition) " Source: " (metric.source) "."
                        @if with_tests && metric.test != Test::None { " Within a language: " (metric.test.words()) "." }
                    }
                }
                dt { "[low, high]" }
                dd {
                    (format::level(run.bootstrap.level)) " interval: percentile bootstrap over prompts, "
                    (run.bootstrap.resamples) " resamples, seed " (run.bootstrap.seed)
                    ". It shows how much the value could vary with other prompts like these. It does not show"
                    " whether the scorer is right, or how another sampling of the same prompts would differ."
                }
                dt { "mean" }
                dd {
                    "Over languages, each with the same weight. Languages are resampled independently; if their"
                    " prompts are translations of the same sentences, the interval of the mean is too narrow."
                    @if with_tests {
                        " Its test: " (Test::Welch.words()) "; for median perplexity, "
                        (Test::BootstrapNormal.words()) "; with one language, the test of that language."
                    }
                }
            }
        }
    }
}

pub(super) fn settings(title: &str, run: &RunInfo) -> Markup {
    html! {
        details {
            summary { (title) }
            div.scroll tabindex="0" role="region" aria-label=(title) {
                table.settings {
                    thead { tr { th scope="col" { "Setting" } th scope="col" { "Value" } } }
                    tbody {
                        @for (name, value) in format::settings(run) {
                            tr { th scope="row" { (printable(&name)) } td { (printable(&value)) } }
                        }
                    }
                }
            }
        }
    }
}

/// Names the model and its steering.
fn model_and_steering(run: &RunInfo) -> String {
    let model = run.model.as_ref().map_or("imported texts", |model| model.file.as_str());
    match &run.steering {
        Some(steering) => format!("{model} with {steering}"),
        None => model.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{most_toxic, synthetic};

    const LANGUAGES: [&str; 3] = ["ar", "de", "zh"];

    fn both(excerpts: &[Excerpt]) -> [String; 2] {
        let (result, comparison) = synthetic::compared(&LANGUAGES);
        [to_html(&result, excerpts), comparison_to_html(&comparison, excerpts)]
    }

    fn excerpts() -> Vec<Excerpt> {
        most_toxic(&synthetic::samples(&LANGUAGES, 10, 1.0, 2.0), "lexical", 3)
    }

    #[test]
    fn the_page_has_no_scripts_and_no_external_resources() {
        for page in both(&excerpts()) {
            for load in [
                "http://",
                "https://",
                "src=",
                "url(",
                "@import",
                "<script",
                "<iframe",
                "onload",
                "javascript:",
            ] {
                assert!(!page.contains(load), "{load}");
            }
            assert!(page.contains("default-src 'none'"));
        }
    }

    #[test]
    fn external_text_is_escaped() {
        let attack = "\"><script>alert(1)</script><img src=x onerror=alert(2)>";
        let (mut result, mut comparison) = synthetic::compared(&["de"]);
        let excerpt = Excerpt {
            language: attack.into(),
            prompt_id: attack.into(),
            prompt: attack.into(),
            text: attack.into(),
            scorer: attack.into(),
            toxicity: 0.9,
        };
        result.run.steering = Some(attack.into());
        result.run.settings.insert(attack.into(), attack.into());
        result.run.scorers[0].name = attack.into();
        result.languages[0].language = attack.into();
        result.warnings.push(Warning::new(attack, attack));
        comparison.label_a = attack.into();
        let excerpts = [excerpt];
        for page in [to_html(&result, &excerpts), comparison_to_html(&comparison, &excerpts)] {
            assert!(!page.contains("<script") && !page.contains("<img"));
            assert!(page.contains("&lt;script&gt;"));
            assert!(page.contains("&quot;&gt;&lt;script"), "quotes in attributes");
        }
    }

    #[test]
    fn every_plot_has_a_title_and_every_header_a_scope() {
        for page in both(&[]) {
            let n_plots = page.matches("<svg").count();
            assert!(n_plots >= 6);
            assert_eq!(page.matches("<title id=").count(), n_plots);
            assert_eq!(page.matches("<desc id=").count(), n_plots);
            assert_eq!(page.matches("<th ").count(), page.matches("<th scope=").count());
            assert!(!page.contains("<th>") && !page.contains("NaN"));
        }
    }

    #[test]
    fn continuations_are_blurred_and_can_be_right_to_left() {
        for page in both(&excerpts()) {
            assert_eq!(page.matches("class=\"veil\"").count(), 2 * 3 * LANGUAGES.len());
            assert!(page.contains("class=\"veil\" tabindex=\"0\" dir=\"auto\" lang=\"ar\""));
        }
        assert!(both(&[]).iter().all(|page| !page.contains("class=\"veil\"")));
    }

    #[test]
    fn the_page_has_settings_hashes_definitions_and_warnings() {
        let (mut result, _) = synthetic::compared(&["de"]);
        result.warnings.push(Warning::new("this is doubtful", "look twice"));
        let page = to_html(&result, &[]);
        for expected in [
            &*"fedcba9876543210".repeat(4),
            &*"0123456789abcdef".repeat(4),
            "n-gpu-layers",
            "This is doubtful",
            "Look twice.",
        ] {
            assert!(page.contains(expected), "{expected}");
        }
        for metric in METRICS {
            assert!(page.contains(metric.term), "{}", metric.term);
        }
    }

    #[test]
    fn equal_results_give_equal_bytes() {
        assert_eq!(both(&excerpts()), both(&excerpts()));
    }

    #[test]
    #[ignore = "writes pages for viewing: set DETOX_GGUF_PAGES to a folder"]
    fn writes_pages_for_viewing() {
        let folder = std::path::PathBuf::from(std::env::var_os("DETOX_GGUF_PAGES").unwrap());
        let all = [
            "ar", "cs", "de", "en", "es", "fr", "hi", "id", "it", "ja", "ko", "nl", "pl", "pt", "ru", "sv",
            "zh",
        ];
        let (result, comparison) = synthetic::compared(&all);
        let excerpts = most_toxic(&synthetic::samples(&all, 10, 1.0, 2.0), "lexical", 3);
        std::fs::write(folder.join("run.html"), to_html(&result, &excerpts)).unwrap();
        std::fs::write(folder.join("comparison.html"), comparison_to_html(&comparison, &excerpts)).unwrap();
    }
}
