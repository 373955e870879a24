//! From logits to a token: greedy, or temperature, top-k, top-p and min-p.
//!
//! The order is that of vLLM, with which the paper sampled: temperature first, then top-k, top-p over
//! what top-k left, then min-p. llama.cpp applies the temperature last; at temperature 1 the two agree.
//!
//! The vocabulary is never sorted. One pass puts each token's probability into a bin by how far its
//! logit lies below the best one; the cuts fall into bins, and only the tokens of those few bins are
//! looked at one by one. So the time hardly depends on how flat the distribution is.

use std::cmp::Ordering;

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

use super::Token;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Sampling {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Keep this many of the most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most probable tokens with at least this mass; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less probable than this share of the most probable one; 0 keeps all.
    pub min_p: f32,
}

impl Sampling {
    /// Temperature 0.9, top-p 0.8, no top-k, no min-p (arXiv 2406.16235, section 3.1).
    pub const PAPER: Sampling = Sampling { temperature: 0.9, top_k: 0, top_p: 0.8, min_p: 0.0 };

    /// Always the most probable token; of equals, the one with the smallest id.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

    /// Refuses values outside their ranges, by the name of the flag.
    pub fn validate(&self) -> Result<()> {
        let Sampling { temperature, top_p, min_p, .. } = *self;
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(Error::setting(
                "--temp",
                format!("expected a number from 0 up, found {temperature}"),
            ));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::setting(
                "--top-p",
                format!("expected a number over 0 and up to 1, found {top_p}"),
            ));
        }
        if !(0.0..=1.0).contains(&min_p) {
            return Err(Error::setting("--min-p", format!("expected a number from 0 to 1, found {min_p}")));
        }
        Ok(())
    }
}

/// A sample's own random stream.
///
/// It depends on the seed, the prompt's id and the sample's number alone, so neither the order of
/// prompts, nor the batch, nor a resumed run changes which stream a sample has.
pub fn random_stream(seed: u64, prompt_id: &str, sample: u32) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    hash.update(b"detox-gguf sample 1\0");
    hash.update(seed.to_le_bytes());
    hash.update(sample.to_le_bytes());
    hash.update(prompt_id.as_bytes());
    ChaCha8Rng::from_seed(hash.finalize().into())
}

/// A chosen token with its log-probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// The token.
    pub token: Token,
    /// Its natural log-probability under the model itself: temperature 1, nothing cut.
    pub logprob: f64,
}

/// Chooses a token from one row of logits, shape `[n_vocab]`.
///
/// Returns `None` if the row holds a NaN or no finite value: no token can be chosen from that.
pub fn choose(logits: &[f32], sampling: &Sampling, random: &mut ChaCha8Rng) -> Option<Choice> {
    let peaks = Peaks::of(logits)?;
    let log_sum = log_sum_exp(logits, peaks.top);
    let logprob = |token: usize| f64::from(logits[token]) - log_sum;

    if sampling.temperature == 0.0 {
        let token = logits.iter().position(|&l| l == peaks.top)?;
        return Some(Choice { token: token as Token, logprob: logprob(token) });
    }

    let token = Nucleus::new(logits, &peaks, sampling).draw(uniform(random))?;
    Some(Choice { token: token as Token, logprob: logprob(token as usize) })
}

/// The natural log-probability of `token` under one row of logits; `None` for a row without a distribution.
pub fn logprob(logits: &[f32], token: Token) -> Option<f64> {
    let logit = *logits.get(usize::try_from(token).ok()?)?;
    Some(f64::from(logit) - log_sum_exp(logits, Peaks::of(logits)?.top))
}

/// A token that may be chosen, with its unnormalised probability: 1 for the most probable token.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    logit: f32,
    weight: f32,
}

impl Candidate {
    /// Most probable first; of equal logits the smaller id, so that the result never depends on the search.
    fn descending(a: &Candidate, b: &Candidate) -> Ordering {
        b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
    }
}

/// Bins of equal width over the logits from the best one down, the last for all that lie further.
const BINS: usize = 1024;
/// How far the bins reach, in nats after the temperature: a token further down has a ten-millionth of
/// the best one's probability.
const REACH: f32 = 16.0;
const BINS_PER_NAT: f32 = (BINS - 1) as f32 / REACH;

/// What top-k, top-p and min-p leave of a vocabulary: all of the first bins, and part of one more.
struct Nucleus<'a> {
    logits: &'a [f32],
    peaks: &'a Peaks,
    scale: f32,
    /// Mass in each bin, and number of tokens where top-k asks for it.
    mass: Box<[f64; BINS]>,
    count: Box<[u32; BINS]>,
    /// Bins before this one are kept whole.
    whole: usize,
    /// What is kept of bin `whole`, most probable first.
    rest: Vec<Candidate>,
}

impl<'a> Nucleus<'a> {
    fn new(logits: &'a [f32], peaks: &'a Peaks, sampling: &Sampling) -> Nucleus<'a> {
        let Sampling { temperature, top_k, top_p, min_p } = *sampling;
        let mut nucleus = Nucleus {
            logits,
            peaks,
            scale: 1.0 / temperature,
            mass: Box::new([0.0; BINS]),
            count: Box::new([0; BINS]),
            whole: BINS,
            rest: Vec::new(),
        };
        let cuts_count = top_k > 0 && (top_k as usize) < logits.len();
        nucleus.fill_bins(cuts_count);
        if cuts_count {
            nucleus.cut_count(top_k);
        }
        if top_p < 1.0 {
            nucleus.cut_mass(f64::from(top_p) * nucleus.total());
        }
        if min_p > 0.0 {
            nucleus.cut_weight(min_p);
        }
        nucleus
    }

    /// How far below the best, in nats after the temperature.
    fn depth(&self, logit: f32) -> f32 {
        (self.peaks.top - logit) * self.scale
    }

    /// `counted`: whether the number of tokens in each bin is asked for, too.
    fn fill_bins(&mut self, counted: bool) {
        let mut weights = [0.0f32; LANES];
        let mut bins = [0u32; LANES];
        let mut halves = Box::new([[0.0f64; BINS]; 2]);
        for (group, &peak) in self.logits.chunks(GROUP).zip(&self.peaks.of_groups) {
            if self.depth(peak) >= REACH {
                self.mass[BINS - 1] += sum_exp(group, self.peaks.top, self.scale);
                self.count[BINS - 1] += group.len() as u32;
                continue;
            }
            let (chunks, rest) = group.as_chunks::<LANES>();
            for chunk in chunks {
                // A plain loop over arrays: `map` with closures was not turned into vectors.
                for i in 0..LANES {
                    let depth = self.depth(chunk[i]);
                    weights[i] = exp_of_nonpositive(-depth);
                    bins[i] = bin_of(depth);
                }
                // Two sums a bin: neighbours often fall into one, and would wait for each other.
                for i in 0..LANES {
                    halves[i % 2][bins[i] as usize % BINS] += f64::from(weights[i]);
                }
                if counted {
                    bins.iter().for_each(|&bin| self.count[bin as usize % BINS] += 1);
                }
            }
            for &logit in rest {
                let depth = self.depth(logit);
                self.mass[bin_of(depth) as usize] += f64::from(exp_of_nonpositive(-depth));
                self.count[bin_of(depth) as usize] += 1;
            }
        }
        for half in halves.iter() {
            self.mass.iter_mut().zip(half).for_each(|(mass, half)| *mass += half);
        }
    }

    /// The tokens of one bin, by id.
    fn tokens_of(&self, bin: usize) -> Vec<Candidate> {
        let mut found = Vec::new();
        for ((i, group), &peak) in self.logits.chunks(GROUP).enumerate().zip(&self.peaks.of_groups) {
            // Most groups have nothing that is as probable.
            if bin_of(self.depth(peak)) > bin as u32 {
                continue;
            }
            for (j, chunk) in group.chunks(LANES).enumerate() {
                // Of the others, most chunks: one vector comparison each.
                if !chunk.iter().fold(false, |any, &l| any | (bin_of(self.depth(l)) == bin as u32)) {
                    continue;
                }
                for (l, &logit) in chunk.iter().enumerate() {
                    let depth = self.depth(logit);
                    if bin_of(depth) == bin as u32 {
                        let token = (i * GROUP + j * LANES + l) as u32;
                        found.push(Candidate { token, logit, weight: exp_of_nonpositive(-depth) });
                    }
                }
            }
        }
        found
    }

    /// Makes `bin` the last one, of which a part may be kept; gives its tokens, most probable first.
    fn open_last(&mut self, bin: usize) -> Vec<Candidate> {
        if bin == self.whole {
            return std::mem::take(&mut self.rest);
        }
        self.whole = bin;
        let mut tokens = self.tokens_of(bin);
        tokens.sort_unstable_by(Candidate::descending);
        tokens
    }

    /// Keeps the `n` most probable tokens.
    fn cut_count(&mut self, n: u32) {
        let mut left = n;
        for bin in 0..self.whole {
            if self.count[bin] >= left {
                self.rest = self.open_last(bin);
                self.rest.truncate(left as usize);
                return;
            }
            left -= self.count[bin];
        }
    }

    /// Keeps the fewest most probable tokens that have `mass` together.
    fn cut_mass(&mut self, mass: f64) {
        let mut left = mass;
        let mut bin = 0;
        while bin < self.whole && self.mass[bin] < left {
            left -= self.mass[bin];
            bin += 1;
        }
        // Beyond the last bin only by rounding: then nothing is cut.
        if bin == BINS {
            return;
        }
        let mut tokens = self.open_last(bin);
        let n = tokens.iter().position(|c| {
            left -= f64::from(c.weight);
            left <= 0.0
        });
        tokens.truncate(n.map_or(tokens.len(), |n| n + 1));
        self.rest = tokens;
    }

    /// Keeps tokens of at least this weight.
    fn cut_weight(&mut self, least: f32) {
        let bin = bin_of(-least.ln()) as usize;
        if bin <= self.whole && bin < BINS {
            self.rest = self.open_last(bin);
            self.rest.retain(|c| c.weight >= least);
        }
    }

    fn total(&self) -> f64 {
        self.mass[..self.whole].iter().sum::<f64>()
            + self.rest.iter().map(|c| f64::from(c.weight)).sum::<f64>()
    }

    /// The token at `share` of the mass, in [0, 1): bin by bin, within a whole bin by id.
    fn draw(&self, share: f64) -> Option<u32> {
        let mut left = share * self.total();
        // Rounding can leave a last crumb of `left`: it goes to the last bin that has any mass.
        let mut chosen = None;
        for bin in 0..self.whole {
            if self.mass[bin] > 0.0 {
                chosen = Some(bin);
                if left < self.mass[bin] {
                    return token_at(&self.tokens_of(bin), left);
                }
                left -= self.mass[bin];
            }
        }
        match chosen {
            Some(bin) if self.rest.is_empty() => token_at(&self.tokens_of(bin), f64::INFINITY),
            _ => token_at(&self.rest, left),
        }
    }
}

/// The candidate under which `left` runs out, else the last one that has any weight.
fn token_at(candidates: &[Candidate], mut left: f64) -> Option<u32> {
    let mut token = None;
    for candidate in candidates.iter().filter(|c| c.weight > 0.0) {
        token = Some(candidate.token);
        left -= f64::from(candidate.weight);
        if left < 0.0 {
            break;
        }
    }
    token
}

/// The bin of a depth: the nearest whole number, at most the last. A conversion to an integer would not
/// be turned into vectors; adding 2^23 leaves the whole number in the low bits instead.
fn bin_of(depth: f32) -> u32 {
    const LAST: f32 = (BINS - 1) as f32;
    let bin = depth * BINS_PER_NAT;
    let bin = if bin < LAST { bin } else { LAST };
    (bin + 8_388_608.0).to_bits() & (BINS as u32 - 1)
}

/// A number in [0, 1) with 53 random bits.
fn uniform(random: &mut ChaCha8Rng) -> f64 {
    (random.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// Lanes of the sums below: wide enough for the widest vector registers, and fixed, so that a sum is
/// the same on every machine.
const LANES: usize = 32;

/// Logits that share a peak: few enough that one high logit hides few others, and enough that finding
/// the peak costs no more than reading them.
const GROUP: usize = 8 * LANES;

/// The largest logit, of all and of each [`GROUP`].
#[derive(Debug)]
struct Peaks {
    top: f32,
    of_groups: Vec<f32>,
}

impl Peaks {
    /// `None` if any logit is NaN, or none is finite.
    fn of(logits: &[f32]) -> Option<Peaks> {
        let mut of_groups = Vec::with_capacity(logits.len().div_ceil(GROUP));
        let mut no_number = [false; LANES];
        let mut has_nan = false;
        for group in logits.chunks(GROUP) {
            let mut lanes = [f32::NEG_INFINITY; LANES];
            let (chunks, rest) = group.as_chunks::<LANES>();
            for chunk in chunks {
                for i in 0..LANES {
                    no_number[i] |= chunk[i].is_nan();
                    lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
                }
            }
            has_nan |= rest.iter().any(|logit| logit.is_nan());
            of_groups.push(lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max));
        }
        let has_nan = has_nan || no_number.contains(&true);
        let top = of_groups.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        (!has_nan && top.is_finite()).then_some(Peaks { top, of_groups })
    }
}

/// ln of the sum of e^logit.
fn log_sum_exp(logits: &[f32], top: f32) -> f64 {
    f64::from(top) + sum_exp(logits, top, 1.0).ln()
}

/// The sum of e^((logit - top) * scale); `top` is the largest logit.
fn sum_exp(logits: &[f32], top: f32, scale: f32) -> f64 {
    // Blocks keep the f32 lanes short: their rounding stays near 1e-7 for any vocabulary.
    const BLOCK: usize = 64 * LANES;
    let mut sum = 0.0f64;
    for block in logits.chunks(BLOCK) {
        let mut lanes = [0.0f32; LANES];
        let (chunks, rest) = block.as_chunks::<LANES>();
        for chunk in chunks {
            for i in 0..LANES {
                lanes[i] += exp_of_nonpositive((chunk[i] - top) * scale);
            }
        }
        sum += lanes.iter().map(|&l| f64::from(l)).sum::<f64>();
        sum += rest.iter().map(|&l| f64::from(exp_of_nonpositive((l - top) * scale))).sum::<f64>();
    }
    sum
}

/// e^x for x <= 0 with a relative error under 5e-6, in operations that compilers turn into
/// vectors; the library's `exp` is a call for each element.
///
/// 2^(n + f) with n whole and f in [-1/2, 1/2]: n goes into the exponent bits, 2^f is a polynomial.
fn exp_of_nonpositive(x: f32) -> f32 {
    let y = (x * std::f32::consts::LOG2_E).max(-126.0);
    // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = y + ROUND;
    let f = (y - (shifted - ROUND)) * std::f32::consts::LN_2;
    // Taylor's series of e^f, |f| <= 0.347: the first term left out is below 1.2e-7.
    let p = 1.0 + f * (1.0 + f * (0.5 + f * (1.0 / 6.0 + f * (1.0 / 24.0 + f * (1.0 / 120.0 + f / 720.0)))));
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < -87.0 { 0.0 } else { p * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Deterministic logits with a spread like a language model's.
    fn logits(n: usize, seed: u64) -> Vec<f32> {
        let mut random = random_stream(seed, "logits", 0);
        (0..n)
            .map(|_| {
                ((uniform(&mut random) + uniform(&mut random) + uniform(&mut random)) * 12.0 - 18.0) as f32
            })
            .collect()
    }

    /// What is kept, by id.
    fn tokens(nucleus: &Nucleus<'_>) -> Vec<u32> {
        let mut tokens: Vec<u32> =
            (0..nucleus.whole).flat_map(|bin| nucleus.tokens_of(bin)).map(|c| c.token).collect();
        tokens.extend(nucleus.rest.iter().map(|c| c.token));
        tokens.sort_unstable();
        tokens
    }

    /// The plain way: sort everything, in f64.
    fn nucleus_by_sorting(logits: &[f32], s: &Sampling) -> Vec<u32> {
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        if s.top_k > 0 {
            order.truncate(s.top_k as usize);
        }
        let top = f64::from(logits[order[0] as usize]);
        let weight = |t: u32| ((f64::from(logits[t as usize]) - top) / f64::from(s.temperature)).exp();
        let total: f64 = order.iter().map(|&t| weight(t)).sum();
        if s.top_p < 1.0 {
            let mut sum = 0.0;
            let n = order.iter().position(|&t| {
                sum += weight(t);
                sum >= f64::from(s.top_p) * total
            });
            order.truncate(n.map_or(order.len(), |n| n + 1));
        }
        order.retain(|&t| weight(t) >= f64::from(s.min_p));
        order.sort_unstable();
        order
    }

    #[test]
    fn the_nucleus_is_the_one_that_sorting_the_whole_vocabulary_finds() {
        let cases = [
            Sampling::PAPER,
            Sampling { top_k: 7, ..Sampling::PAPER },
            Sampling { top_k: 40, top_p: 1.0, ..Sampling::PAPER },
            Sampling { min_p: 0.05, ..Sampling::PAPER },
            Sampling { min_p: 0.01, top_p: 1.0, ..Sampling::PAPER },
            Sampling { temperature: 3.0, top_p: 0.99, ..Sampling::PAPER },
            Sampling { temperature: 0.05, top_p: 0.5, ..Sampling::PAPER },
            Sampling { temperature: 50.0, top_k: 900, ..Sampling::PAPER },
        ];
        for (i, sampling) in cases.iter().enumerate() {
            for seed in 0..20 {
                let row = logits(1000 + 17 * seed as usize, seed);
                let found = tokens(&Nucleus::new(&row, &Peaks::of(&row).unwrap(), sampling));
                assert_eq!(found, nucleus_by_sorting(&row, sampling), "case {i}, seed {seed}");
            }
        }
    }

    #[test]
    fn top_p_keeps_the_token_that_crosses_the_bound() {
        // Probabilities 0.5, 0.3, 0.15, 0.05; at 0.8 the second token reaches the bound, at 0.81 the third must help.
        let row: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let kept = |top_p| {
            let sampling = Sampling { temperature: 1.0, top_p, ..Sampling::PAPER };
            tokens(&Nucleus::new(&row, &Peaks::of(&row).unwrap(), &sampling)).len()
        };
        assert_eq!(kept(0.79), 2);
        assert_eq!(kept(0.81), 3);
        assert_eq!(kept(0.5), 1);
    }

    #[test]
    fn chosen_tokens_follow_the_distribution() {
        // 0.8 of the mass is tokens 0 and 1, with 0.5 and 0.3: renormalised 0.625 and 0.375.
        let row: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let sampling = Sampling { temperature: 1.0, top_p: 0.79, ..Sampling::PAPER };
        let n = 20_000;
        let zeros = (0..n)
            .filter(|&i| choose(&row, &sampling, &mut random_stream(1, "p", i)).unwrap().token == 0)
            .count();
        // The standard error of the share is sqrt(0.625 * 0.375 / 20000) = 0.0034; four of them.
        assert!((zeros as f64 / f64::from(n) - 0.625).abs() < 0.014, "{zeros} of {n}");
    }

    #[test]
    fn a_logprob_is_that_of_the_model_whatever_the_temperature() {
        let row: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln() + 3.0).collect();
        for temperature in [0.0, 0.5, 2.0] {
            let sampling = Sampling { temperature, top_p: 0.4, ..Sampling::PAPER };
            let choice = choose(&row, &sampling, &mut random_stream(1, "p", 0)).unwrap();
            assert_eq!(choice.token, 0);
            assert!((choice.logprob - 0.5f64.ln()).abs() < 1e-6);
        }
    }

    #[test]
    fn log_sums_agree_with_double_precision() {
        for n in [1, 31, 32, 33, 2048, 49_152, 262_144] {
            let row = logits(n, n as u64);
            let top = Peaks::of(&row).unwrap().top;
            let exact: f64 = row.iter().map(|&l| (f64::from(l) - f64::from(top)).exp()).sum::<f64>().ln();
            assert!((log_sum_exp(&row, top) - f64::from(top) - exact).abs() < 1e-6, "{n}");
        }
    }

    #[test]
    fn the_fast_exponential_is_accurate_to_five_in_a_million() {
        let mut worst = 0.0f64;
        for i in 0..870_000 {
            let x = -(i as f32) * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp_of_nonpositive(x)) - exact).abs() / exact);
        }
        // x * log2(e) is rounded before it is split: at x = -87 half a unit in its last place is 4e-6.
        assert!(worst < 5e-6, "{worst}");
        assert_eq!(exp_of_nonpositive(0.0), 1.0);
        assert_eq!(exp_of_nonpositive(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn greedy_takes_the_smallest_id_of_equals() {
        let choice = choose(&[1.0, 5.0, 5.0, 2.0], &Sampling::GREEDY, &mut random_stream(0, "", 0)).unwrap();
        assert_eq!(choice.token, 1);
    }

    #[test]
    fn a_row_with_a_nan_or_without_a_finite_value_gives_no_token() {
        let mut nan = logits(100, 3);
        nan[50] = f32::NAN;
        let none = vec![f32::NEG_INFINITY; 100];
        for row in [nan, none, vec![]] {
            assert_eq!(choose(&row, &Sampling::PAPER, &mut random_stream(0, "", 0)), None);
        }
    }

    #[test]
    fn a_banned_token_is_never_chosen() {
        let row = [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY];
        let open = Sampling { top_p: 1.0, ..Sampling::PAPER };
        for sampling in [Sampling::PAPER, open] {
            for sample in 0..100 {
                assert_eq!(choose(&row, &sampling, &mut random_stream(0, "", sample)).unwrap().token, 1);
            }
        }
    }

    #[test]
    fn streams_differ_by_seed_prompt_and_sample_and_by_nothing_else() {
        let first = |seed, id, sample| random_stream(seed, id, sample).next_u64();
        assert_eq!(first(1, "en/1", 0), first(1, "en/1", 0));
        let all = [first(1, "en/1", 0), first(2, "en/1", 0), first(1, "en/2", 0), first(1, "en/1", 1)];
        for (i, a) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|b| a != b));
        }
    }

    #[test]
    fn rejects_settings_outside_their_ranges() {
        let bad = [
            Sampling { temperature: -1.0, ..Sampling::PAPER },
            Sampling { temperature: f32::NAN, ..Sampling::PAPER },
            Sampling { top_p: 0.0, ..Sampling::PAPER },
            Sampling { top_p: 1.5, ..Sampling::PAPER },
            Sampling { min_p: -0.1, ..Sampling::PAPER },
        ];
        for sampling in bad {
            assert!(sampling.validate().unwrap_err().is_usage());
        }
        assert!(Sampling::PAPER.validate().is_ok() && Sampling::GREEDY.validate().is_ok());
    }
}
