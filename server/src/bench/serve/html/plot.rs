//! Plots as SVG, coloured by the page's style sheet.

use std::fmt::Write;

use super::escaped;
use crate::bench::serve::flags::Metric;
use crate::bench::statistics::Distribution;

/// From numbers to places along one side of a plot.
#[derive(Clone, Debug)]
pub(super) struct Scale {
    low: f64,
    high: f64,
    /// Where low and high are drawn.
    from: f64,
    to: f64,
    /// Whether equal distances are equal factors.
    is_log: bool,
}

impl Scale {
    pub(super) fn linear(high: f64, from: f64, to: f64) -> Self {
        let high = if 0.0 < high { high } else { 1.0 };
        Self { low: 0.0, high, from, to, is_log: false }
    }

    /// Logarithmic where the numbers, which have a long tail, would otherwise all be at one end.
    fn of(numbers: &Distribution, high: f64, from: f64, to: f64) -> Self {
        let low = numbers.percentile(1.0);
        if 0.0 < low && 30.0 < high / low {
            return Self { low: low * 0.9, high, from, to, is_log: true };
        }
        Self::linear(high, from, to)
    }

    pub(super) fn at(&self, number: f64) -> f64 {
        let share = if self.is_log {
            (number.max(self.low) / self.low).ln() / (self.high / self.low).ln()
        } else {
            (number - self.low) / (self.high - self.low)
        };
        self.from + (self.to - self.from) * share.clamp(0.0, 1.0)
    }

    /// Round numbers along the scale, some `count` of them.
    pub(super) fn ticks(&self, count: f64) -> Vec<f64> {
        if self.is_log {
            let decades = (self.low.log10().floor() as i32)..=(self.high.log10().ceil() as i32);
            let steps: &[f64] = if 3.0 < (self.high / self.low).log10() { &[1.0] } else { &[1.0, 2.0, 5.0] };
            let all = decades.flat_map(|decade| steps.iter().map(move |step| step * 10_f64.powi(decade)));
            return all.filter(|tick| (self.low..=self.high).contains(tick)).collect();
        }
        let rough = (self.high - self.low) / count;
        let decade = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|step| step * decade).into_iter().find(|step| rough <= *step);
        let step = step.unwrap_or(decade * 10.0);
        let last = (self.high / step + 1e-9).floor() as usize;
        (0..=last).map(|index| index as f64 * step).collect()
    }
}

/// The share of requests that took at most so long, with percentiles marked, and the limit where there is one.
pub(super) fn cumulative(
    metric: Metric,
    numbers: &Distribution,
    percents: &[f64],
    limit_ms: Option<f64>,
) -> String {
    const WIDTH: f64 = 540.0;
    const HEIGHT: f64 = 270.0;
    const LEFT: f64 = 46.0;
    const RIGHT: f64 = WIDTH - 16.0;
    const TOP: f64 = 22.0;
    const BOTTOM: f64 = HEIGHT - 40.0;
    // A limit far beyond would press the curve into a corner; the table still has it.
    let shown_limit = limit_ms.filter(|&limit| limit < 3.0 * numbers.max());
    let high = (numbers.max() * 1.03).max(shown_limit.map_or(0.0, |limit| limit * 1.06));
    let (x, y) = (Scale::of(numbers, high, LEFT, RIGHT), Scale::linear(1.0, BOTTOM, TOP));
    let mut svg = open(WIDTH, HEIGHT, &format!("Cumulative distribution: {}", metric.title()));
    for share in [0.0, 0.25, 0.5, 0.75, 1.0] {
        line(&mut svg, if share == 0.0 { "axis" } else { "grid" }, (LEFT, y.at(share)), (RIGHT, y.at(share)));
        text(&mut svg, "end", "", (LEFT - 8.0, y.at(share) + 4.0), &format!("{:.0} %", share * 100.0));
    }
    for tick in x.ticks(6.0) {
        line(&mut svg, "grid", (x.at(tick), TOP), (x.at(tick), BOTTOM));
        text(&mut svg, "middle", "", (x.at(tick), BOTTOM + 18.0), &short(tick));
    }
    text(&mut svg, "end", "", (RIGHT, HEIGHT - 4.0), "milliseconds");
    let curve = stairs(numbers, &x, &y);
    let _ = write!(
        svg,
        "<path class=\"area\" d=\"{curve} V{BOTTOM:.1} H{:.1} Z\"/>",
        x.at(numbers.percentile(0.0))
    );
    let _ = write!(svg, "<path class=\"curve\" d=\"{curve}\"/>");
    if let Some(limit) = shown_limit {
        line(&mut svg, "limit", (x.at(limit), TOP - 6.0), (x.at(limit), BOTTOM));
        let side = if x.at(limit) < (LEFT + RIGHT) / 2.0 { ("start", 5.0) } else { ("end", -5.0) };
        text(
            &mut svg,
            side.0,
            "limit-name",
            (x.at(limit) + side.1, TOP - 8.0),
            &format!("limit {}", short(limit)),
        );
    }
    for &percent in percents {
        let (ms, share) = (numbers.percentile(percent), percent / 100.0);
        let (cx, cy) = (x.at(ms), y.at(share));
        line(&mut svg, "drop", (cx, cy), (cx, BOTTOM));
        let name = format!("p{percent} {}", short(ms));
        let _ = write!(
            svg,
            "<circle class=\"dot\" cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"4\"><title>{name} ms</title></circle>"
        );
        let side = if cx < LEFT + (RIGHT - LEFT) * 0.7 { ("start", 9.0) } else { ("end", -9.0) };
        text(&mut svg, side.0, "strong", (cx + side.1, cy + 4.0), &name);
    }
    svg + "</svg>"
}

/// The outline of a cumulative distribution, thinned out where there are more numbers than dots on a screen.
fn stairs(numbers: &Distribution, x: &Scale, y: &Scale) -> String {
    let sorted = numbers.sorted();
    let step = sorted.len().div_ceil(600).max(1);
    let mut path = format!("M{:.1} {:.1}", x.at(numbers.percentile(0.0)), y.at(0.0));
    for index in (0..sorted.len()).step_by(step).chain([sorted.len().saturating_sub(1)]) {
        let share = (index + 1) as f64 / sorted.len() as f64;
        let _ = write!(path, " H{:.1} V{:.1}", x.at(sorted[index]), y.at(share));
    }
    path
}

/// Begins a drawing that is read out as `name`.
pub(super) fn open(width: f64, height: f64, name: &str) -> String {
    format!("<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">", escaped(name))
}

pub(super) fn line(svg: &mut String, class: &str, from: (f64, f64), to: (f64, f64)) {
    let _ = write!(
        svg,
        "<line class=\"{class}\" x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\"/>",
        from.0, from.1, to.0, to.1
    );
}

pub(super) fn text(svg: &mut String, anchor: &str, class: &str, at: (f64, f64), words: &str) {
    let _ = write!(
        svg,
        "<text class=\"{class}\" text-anchor=\"{anchor}\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
        at.0,
        at.1,
        escaped(words)
    );
}

/// As many digits as one reads off a plot.
pub(super) fn short(number: f64) -> String {
    match number.abs() {
        large if 10_000.0 <= large => format!("{:.0}k", number / 1000.0),
        large if 1000.0 <= large => format!("{:.1}k", number / 1000.0).replace(".0k", "k"),
        middle if 100.0 <= middle || middle == 0.0 => format!("{number:.0}"),
        middle if 10.0 <= middle => format!("{number:.1}").trim_end_matches(".0").to_owned(),
        small if 0.1 <= small => {
            format!("{number:.2}").trim_end_matches('0').trim_end_matches('.').to_owned()
        }
        _ => format!("{number:.4}").trim_end_matches('0').to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        #[rustfmt::skip]
        let rows = [
            (Scale::linear(10.0, 0.0, 1.0),   5.0, vec![0.0, 2.0, 4.0, 6.0, 8.0, 10.0]),
            (Scale::linear(0.7, 0.0, 1.0),    7.0, vec![0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
            (Scale::linear(1234.0, 0.0, 1.0), 4.0, vec![0.0, 500.0, 1000.0]),
            (Scale::linear(0.0, 0.0, 1.0),    2.0, vec![0.0, 0.5, 1.0]),
            (Scale { is_log: true, low: 3.0, ..Scale::linear(300.0, 0.0, 1.0) }, 5.0, vec![5.0, 10.0, 20.0, 50.0, 100.0, 200.0]),
        ];
        for (scale, count, expected) in rows {
            let found = scale.ticks(count);
            let close = found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-9);
            assert!(close && found.len() == expected.len(), "{scale:?}: {found:?}");
        }
    }

    #[test]
    fn a_scale_goes_from_end_to_end_and_not_beyond() {
        let plain = Scale::linear(50.0, 100.0, 200.0);
        assert_eq!([0.0, 25.0, 50.0, 99.0].map(|number| plain.at(number)), [100.0, 150.0, 200.0, 200.0]);
        let tail = Distribution::new([1.0, 1.0, 2.0, 1000.0]);
        let log = Scale::of(&tail, 1000.0, 0.0, 100.0);
        assert!(log.is_log && log.at(0.0) == 0.0 && (log.at(1000.0) - 100.0).abs() < 1e-9, "{log:?}");
    }

    #[test]
    fn a_plot_marks_percentiles_and_its_limit() {
        let numbers = Distribution::new((1..=100).map(f64::from));
        let plot = cumulative(Metric::Ttft, &numbers, &[50.0, 99.0], Some(80.0));
        for part in ["<svg", "p50 50.5", "p99 99", "limit 80", "</svg>"] {
            assert!(plot.contains(part), "`{part}` is missing in {plot}");
        }
        assert!(
            !cumulative(Metric::Ttft, &numbers, &[], Some(9000.0)).contains("limit"),
            "it is far outside"
        );
    }

    #[test]
    fn numbers_are_short() {
        let rows = [
            (0.0, "0"),
            (0.05, "0.05"),
            (1.5, "1.5"),
            (12.0, "12"),
            (12.34, "12.3"),
            (250.0, "250"),
            (1500.0, "1.5k"),
            (20_000.0, "20k"),
        ];
        for (number, expected) in rows {
            assert_eq!(short(number), expected);
        }
    }
}
