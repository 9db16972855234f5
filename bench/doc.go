// Package bench measures the promises of SPECIFICATION.md: all in one run, side
// by side with the alternative where there is one, as medians, with the
// environment printed first. Run it with `make bench`; nothing here is a test, and
// no bound stands in a timed test elsewhere.
package bench
