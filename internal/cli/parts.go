package cli

import (
	"tandem/api/resource"
	v1 "tandem/api/tandem/v1"

	"github.com/spf13/cobra"
)

func parent(use, short string, children ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	c.AddCommand(children...)
	return c
}

func parseSize(cpus, memory string) (*v1.Size, error) {
	if cpus == "" && memory == "" {
		return nil, nil
	}
	s := &v1.Size{}
	var err error
	if cpus != "" {
		if s.CpuMilli, err = resource.ParseCPU(cpus); err != nil {
			return nil, usageError("CPUs: %v", err)
		}
	}
	if memory != "" {
		if s.MemoryBytes, err = resource.ParseMemory(memory); err != nil {
			return nil, usageError("memory: %v", err)
		}
	}
	return s, nil
}
